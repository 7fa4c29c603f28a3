"""Every metric of a model, a codec or finished samples, each with the protocol that it needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from carrara import codecs, distributed, weights
from carrara.app.evaluate_request import EvaluateRequest, SweepRequest, refuse
from carrara.app.events import Event, Metrics, Notice, Saved, StepDone
from carrara.app.models import is_codec, open_model
from carrara.app.stream import Report, streamed
from carrara.classifier import Classifier
from carrara.codecs import Codec, LearnedCodec
from carrara.errors import UserError
from carrara.evaluation import Evaluation, Measurements, Pictures, Reference, page, protocol, stamp, tables
from carrara.evaluation import reference as references
from carrara.evaluation.collect import ROWS
from carrara.evaluation.features import open_features
from carrara.evaluation.features.checksum import file_checksum, tensors_checksum
from carrara.evaluation.held_out import measure_held_out
from carrara.evaluation.latents import measure_latents
from carrara.evaluation.pairs import reconstruction
from carrara.evaluation.pictures import Size, data_pictures, decoded_pictures, model_pictures
from carrara.files import write_whole
from carrara.interop import lpips
from carrara.model import DiffusionModel

Proportions = Mapping[str, int] | None
"""How many pictures of each class; None takes the classes in turn."""


def evaluate(request: EvaluateRequest) -> Iterator[Event]:
    """Measure; the processes of a launcher divide the work, and the first reports.

    Yields:
        How far it is, then `Metrics` "evaluation" (`result`: `Measurements`), then what was saved.

    Raises:
        UserError: inputs that contradict each other, before anything is read; data that do not fit.
    """
    refuse(request)
    return streamed(lambda report: _evaluate(request, report))


def sweep(request: SweepRequest) -> Iterator[Event]:
    """Measure a model in every way of a table, each cell saved in the folder as soon as it is measured.

    Yields:
        How far it is, then `Metrics` "table" (`result`: `tables.Table`), then the saved folder.

    Raises:
        UserError: as of `evaluate`, or the folder holds another table.
    """
    refuse(request)
    return streamed(lambda report: _sweep(request, report))


def _evaluate(request: EvaluateRequest, report: Report) -> None:
    processes = distributed.start(request.device)
    report = report if processes.first else _silent
    filled = [tables.read(folder) for folder in request.tables]
    work = Work(request, processes.device, report)
    metrics: Measurements = {}
    evaluation: Evaluation | None = None
    if work.real is not None:
        evaluation = work.measure(work.samples(request))
        metrics |= evaluation.metrics
    if request.held_out is not None:
        metrics |= work.held_out(request, request.held_out)
    if request.originals is not None:
        metrics |= work.reconstruction(request, request.originals)
    text = stamp.to_json(metrics)
    report(Metrics("evaluation", json.loads(text), metrics))
    if request.out is not None and processes.first:
        write_whole(request.out, (text + "\n").encode())
        report(Saved("metrics", request.out))
    if request.report is not None and evaluation is not None and work.real is not None:
        whole = page.of_evaluation(request.subject, replace(evaluation, metrics=metrics), work.real, work.known, filled)
        path = request.report
        distributed.run_on_rank0(lambda: whole.write(path))
        report(Saved("report", path))
    distributed.finish()


def _sweep(request: SweepRequest, report: Report) -> None:
    processes = distributed.start(request.device)
    report = report if processes.first else _silent
    work = Work(request, processes.device, report)
    model, real = work.model, work.real
    assert model is not None  # both refused before
    assert real is not None
    count, kind = work.count(real), request.table
    free = request.sampling.keys() - tables.TABLES[kind]
    own = {name: request.sampling[name] for name in sorted(free) if request.sampling[name] is not None}
    own = {**tables.DEFAULTS.get(kind, {}), **own}
    proportions = work.proportions(model, real)
    about = {"model": _fingerprint(model), "n": count, **own, **work.about(real)}
    about["classes"] = "turn" if proportions is None else "reference"
    if work.guide is not None:
        about["classifier"] = tensors_checksum(work.guide.network.state_dict())
    null = any(conditioner.dropout > 0 for conditioner in model.conditioners)
    plan = tables.cells(kind, model.schedule, work.guide is not None, null)

    def measure(cell: tables.Cell) -> Evaluation:
        report(StepDone("cells", plan.index(cell), len(plan), cell.stem))
        return work.measure(work.sampled(model, cell.stem, count, proportions, {**own, **cell.choices}), f"{cell.stem}")

    filled = tables.fill(request.out, kind, plan, about, measure)

    def write() -> None:
        tables.write(filled)
        page.of_table(filled).write(filled.folder / "table.html")

    cells = [{"line": c.line, "place": c.place, "metrics": json.loads(stamp.to_json(f))} for c, f in filled.cells]
    report(Metrics("table", {"table": kind, "protocol": dict(filled.protocol), "cells": cells}, filled))
    distributed.run_on_rank0(write)
    report(Saved("table", request.out))
    distributed.finish()


def _fingerprint(model: DiffusionModel) -> str:
    """A hash of the weights and of everything else that decides what they predict."""
    config = {name: value for name, value in model.config().items() if name not in ("sampling", "origin")}
    about = json.dumps({**config, "weights": tensors_checksum(model.network.state_dict())}, sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()


def _silent(event: Event) -> None:
    """Where another process reports."""


class Work:
    """What a request needs, opened; whatever can be refused is refused before the reference is read."""

    def __init__(self, request: EvaluateRequest | SweepRequest, device: Any, report: Report) -> None:
        self.request, self.device, self.report = request, device, report
        self.size = Size(request.resolution, request.channels, request.resize)
        self.model: DiffusionModel | None = None
        self.codec: Codec | None = None
        self.finished: Pictures | None = None
        if is_codec(request.subject):
            self.codec = codecs.load(request.subject, device)
        elif weights.holds(request.subject):
            self.model = open_model(request.subject, device, request.precision)
            self.codec = self.model.codec
        else:
            split = request.split if isinstance(request, EvaluateRequest) else "train"
            self.finished = self._read(request.subject, split, request.n)
        self.evaluator: Any = request.evaluator
        if request.evaluator not in (None, "svc"):
            self.evaluator = Classifier.load(request.evaluator, device)
        self.guide = None if request.classifier is None else Classifier.load(request.classifier, device)
        if self.model is not None and request.reference is not None:
            self._check_sampling(self.model)
        self._check_classes()
        self.features = open_features(request.features, device, checksum=request.checksum)
        self.real: Reference | None = None
        self.known: Reference | None = None
        if request.reference is not None:
            self.real = self._reference(request.reference)
            if request.train is not None:  # all of them are kept: a copy may be of any
                pictures = self._read(request.train, request.train_split)
                self.known = self._collected(pictures, "training images", pictures.count)

    def _check_sampling(self, model: DiffusionModel) -> None:
        """Raises UserError where sampling would refuse its arguments, except those that a table varies."""
        varied = tables.TABLES[self.request.table] if isinstance(self.request, SweepRequest) else set()
        arguments = {name: value for name, value in self.request.sampling.items() if name not in varied}
        labels = None if model.class_names(self.guide) is None else [0]
        model.plan(labels, classifier=self.guide, **arguments)

    def _check_classes(self) -> None:
        """Raises UserError where classes are to be measured of samples that have none."""
        option = "evaluator" if self.request.evaluator is not None else "per_class" if self.request.per_class else None
        if self.model is not None:
            labelled = self.model.class_names(self.guide) is not None
        else:
            labelled = self.finished is None or self.finished.labels is not None
        if option is not None and not labelled:
            raise UserError(
                f"--{option.replace('_', '-')} needs samples with classes, unlike {self.request.subject}.",
                key=option,
                code="mismatch",
            )

    def progress(self, task: str, total: int) -> Callable[[int], None]:
        """What reports how many of a task's pictures are done."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.report(StepDone(task, done, total))

        self.report(StepDone(task, 0, total))
        return advance

    def _reference(self, path: str) -> Reference:
        images: Reference | None = None
        if not references.holds_statistics(path) or references.holds_images(path):
            pictures = self._read(path, self.request.reference_split)
            images = self._collected(pictures, "reference")
            if self.finished is not None and self.finished.survey is not None and pictures.survey is not None:
                sides = self.finished.survey, self.finished.name, pictures.survey, pictures.name
                self._warn(*sides[0].against(sides[1], sides[2], sides[3]))
        if not references.holds_statistics(path):
            assert images is not None
            return images
        reference = references.statistics_reference(path, self.features, images)
        self._warn(*reference.notices)
        return reference

    def _warn(self, *sentences: str) -> None:
        for sentence in sentences:
            self.report(Notice(sentence))

    def _read(self, path: str, split: str, n: int | None = None, **choices: Any) -> Pictures:
        """The pictures of a data set, with a notice of what reading them converts."""
        pictures = data_pictures(path, split, n, self.size, **choices)
        self._warn(*pictures.notices)
        return pictures

    def _collected(self, pictures: Pictures, task: str, rows: int = ROWS) -> Reference:
        progress = self.progress(task, pictures.count)
        return references.collected_reference(pictures, self.features, rows, progress, self.device)

    # ---- samples -----------------------------------------------------------------------------------------------

    def samples(self, request: EvaluateRequest) -> Pictures:
        """A model's samples, a codec's reconstructions of the originals, or finished samples."""
        assert self.real is not None
        if self.finished is not None:
            pictures = self.finished
        elif self.model is not None:
            proportions = self.proportions(self.model, self.real)
            pictures = self.sampled(self.model, request.subject, self.count(self.real), proportions, request.sampling)
        else:
            assert self.codec is not None
            assert request.originals is not None  # refused before
            originals = self._read(request.originals, request.originals_split, request.n)
            pictures = decoded_pictures(self.codec, originals, request.subject, self.device)
        return pictures if request.captions is None else replace(pictures, captions=_lines(pictures, request.captions))

    def sampled(
        self,
        model: DiffusionModel,
        name: str,
        count: int,
        proportions: Mapping[str, int] | None,
        choices: dict[str, Any],
    ) -> Pictures:
        """Samples of the model, guided by the classifier where there is one."""
        batch = self.request.batch_size
        return model_pictures(model, name, count, batch, classifier=self.guide, proportions=proportions, **choices)

    def count(self, real: Reference) -> int:
        """How many samples a model makes: `n`, or as many as there are real images, 10,000 at most."""
        return min(real.count or ROWS, ROWS) if self.request.n is None else self.request.n

    def proportions(self, model: DiffusionModel, real: Reference) -> Proportions:
        """How many pictures of each class the reference has, for samples to take the classes in these proportions;
        None takes them in turn.

        Raises:
            UserError: the proportions were requested, but the reference has no classes.
        """
        wanted = self.request.classes
        labels = None if real.pictures is None else real.pictures.labels
        if wanted == "reference" and labels is None:
            raise UserError(
                f"--classes reference: {real.name} has no classes; give --classes turn.", key="classes", code="mismatch"
            )
        if wanted == "turn" or labels is None:
            return None
        counts = Counter(labels)
        fits = counts.keys() <= set(model.class_names(self.guide) or ())
        return counts if wanted == "reference" or fits else None

    # ---- metrics -----------------------------------------------------------------------------------------------

    def about(self, real: Reference) -> dict[str, str | bool | None]:
        """What decides the metrics in addition to the samples."""
        known = None if self.known is None else self.known.content
        about = {"reference": real.content, "train": known, "evaluator": self.request.evaluator}
        return references.features_of(self.features) | about

    def measure(self, samples: Pictures, task: str = "samples") -> Evaluation:
        """Every metric of the samples against the reference."""
        assert self.real is not None
        evaluation = protocol.evaluate(
            samples,
            self.real,
            self.features,
            self.known,
            self.evaluator,
            self.request.per_class,
            self.progress(task, samples.count),
            on_metric=lambda name, done, total: self.report(StepDone("metrics", done, total, name)),
        )
        self._warn(*evaluation.notices)
        return evaluation

    def held_out(self, request: EvaluateRequest, path: str) -> Measurements:
        """The bits per dimension of images that the model never saw."""
        assert self.model is not None  # refused before
        split, n = request.held_out_split, request.held_out_n
        pictures = self._read(path, split, n, batch_size=request.batch_size, rounded=False)
        progress = self.progress("held-out images", pictures.count)
        variance: Any = request.variance
        return measure_held_out(self.model, pictures, variance=variance, seed=request.seed, progress=progress)

    def reconstruction(self, request: EvaluateRequest, path: str) -> Measurements:
        """How close pictures are to the originals, one by one; of a codec also what its latents cost."""
        perceptual, checksum = None, ""
        if request.lpips is not None:
            perceptual = lpips.load(request.lpips, request.lpips_checksum)
            checksum = file_checksum(request.lpips)
        originals = self._read(path, request.originals_split, request.n)
        pictures = self.finished
        if pictures is None:
            assert self.codec is not None
            if self.codec.bounded:
                raise UserError(
                    f"{request.subject} works on pixels: it has no codec to encode and decode images.",
                    key="originals",
                    code="conflict",
                )
            pictures = decoded_pictures(self.codec, originals, request.subject, self.device)
        progress = self.progress("pairs", originals.count)
        metrics = reconstruction(pictures, originals, perceptual, checksum, progress, self._warn)
        if isinstance(self.codec, LearnedCodec):
            metrics |= measure_latents(self.codec, originals, metrics["psnr"].stamp, self.device)
        return metrics


def _lines(pictures: Pictures, path: Path) -> list[str]:
    """The captions in a file, one line for each picture.

    Raises:
        UserError: another number of lines than of pictures, or a file that is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the captions '{path}' cannot be read: {error}.", key="captions", code="damaged") from None
    lines = lines[:-1] if lines[-1] == "" else lines
    if len(lines) != pictures.count:
        raise UserError(
            f"'{path}' holds {len(lines):,} captions for {pictures.count:,} pictures of {pictures.name}: "
            "write one line for each, in their order.",
            key="captions",
            code="mismatch",
        )
    return [lines[row] for row in _written_order(pictures)]


def _written_order(pictures: Pictures) -> list[int]:
    """The line of each picture: lines follow the data set's order, pictures may be drawn from it in another.

    Raises:
        UserError: pictures that are a part of their data set, or whose numbers are not in the order of their names.
    """
    if pictures.survey is None:
        return list(range(pictures.count))
    order = pictures.survey.order
    if sorted(order) != list(range(pictures.count)):
        raise UserError(
            f"--captions has a line for each picture, so it needs all of {pictures.name}: leave --n out.",
            key="captions",
            code="conflict",
        )
    names = [name for _, name in sorted(zip(order, pictures.survey.names, strict=True))]
    numbers = [int(digits[-1]) for digits in (re.findall(r"[0-9]+", Path(name).stem) for name in names) if digits]
    if len(set(numbers)) == len(names) and numbers != sorted(numbers):
        raise UserError(
            f"the lines of --captions have no names, and {pictures.name} sorts as {', '.join(names[:3])} …: number the "
            "pictures with leading zeros, so that both are in one order.",
            key="captions",
            code="mismatch",
        )
    return order
