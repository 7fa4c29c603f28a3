"""What the demo measures: the metrics of `evaluate` with their stamps, against targets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import carrara
from carrara.evaluation import Evaluation, Measurement, Pictures, Reference, class_std, collected_reference, protocol
from carrara.evaluation.features import Pixels
from carrara.evaluation.neighbours import nearest
from carrara.evaluation.pictures import data_pictures
from carrara.evaluation.report import MetricRow
from carrara.model import DiffusionModel
from carrara.sampling import UNSTAMPED, Samples
from carrara.solvers import Step

SHOWN = 16
"""Samples whose nearest training image is shown."""


@dataclass(frozen=True)
class Digits:
    """The scanned digits as references: to train on, held out, and both; with their own 17 gray levels."""

    train: Reference
    held_out: Reference
    all: Reference

    @classmethod
    def read(cls) -> Digits:
        """All 1,797, in the data set's own order."""
        parts = [data_pictures("digits", split, rounded=False) for split in ("train", "test")]
        images = torch.cat([image for part in parts for image in part.batches()])
        labels = [label for part in parts for label in part.labels or ()]
        both = Pictures("digits", len(images), lambda rows: images[rows.start : rows.stop], labels=labels, split="all")
        return cls(*(collected_reference(part, Pixels(), part.count) for part in (*parts, both)))

    @cached_property
    def images(self) -> Tensor:
        """All of them, float32 [1797, 1, 8, 8] in [-1, 1]."""
        return torch.cat(list(_pictures(self.all).batches()))

    @property
    def labels(self) -> list[int]:
        """Their classes."""
        return [int(label) for label in self.all.labels or ()]


@dataclass(frozen=True)
class Drawn:
    """The samples, as files hold them (8 bits a pixel), guided and not."""

    guided: Samples
    unguided: Samples


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        metrics: every metric that has a target, or that one is compared with.
        guided: the guided samples against the held-out digits, with the training digits for memorisation.
        data: what they were measured against.
        nearest, distances: of the first 16 guided samples, the nearest training image and how far it is, Euclidean in
            pixels of [-1, 1].
        film: noisy images, predicted clean images [K, 1, 8, 8] and times of one picture being denoised.
        curves: Fréchet distance by solver, one value for each of `curve_steps`, of `curve_samples` samples.
    """

    metrics: list[MetricRow]
    guided: Evaluation
    data: Digits
    nearest: list[int]
    distances: list[float]
    film: tuple[Tensor, Tensor, list[float]]
    curves: dict[str, list[float]] = field(default_factory=dict)
    curve_steps: tuple[int, ...] = ()
    curve_samples: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        curves = {"steps": list(self.curve_steps), "frechet_distance": self.curves}
        near = {"training_image": self.nearest, "distance": self.distances}
        metrics = [{**asdict(metric), "reached": metric.reached} for metric in self.metrics]
        return {"carrara": carrara.__version__, "metrics": metrics, "solvers": curves, "nearest_of_16": near}


def measure(drawn: Drawn, data: Digits, film: tuple[Tensor, Tensor, list[float]]) -> Results:
    """All metrics of the demo."""
    sets = {"guided": _as_pictures("guided", drawn.guided), "unguided": _as_pictures("unguided", drawn.unguided)}
    labelled = {name: _evaluate(own, data.train, evaluator="svc") for name, own in sets.items()}
    real = _evaluate(_pictures(data.held_out), data.train, evaluator="svc")
    memory = {name: _evaluate(own, data.held_out, data.train) for name, own in sets.items()}
    distance = _evaluate(sets["unguided"], data.all)
    metrics = [
        _row("Digits of the requested class, guided", labelled["guided"], "class_accuracy", "%", at_least=99.0),
        _row("Digits of the requested class, unguided", labelled["unguided"], "class_accuracy", "%", at_least=96.0),
        _row("Digits predicted rightly, held-out images", real, "class_accuracy", "%", comment="the SVC's own limit"),
        _row("Fréchet distance, unguided", distance, "frechet_distance", at_most=0.40, comment="not a FID"),
        _row("Fréchet distance, training to held-out images", real, "frechet_distance"),
    ]
    for name, evaluation in memory.items():
        comment = f"held-out digits {100 * evaluation.metrics['memorised_fraction_held_out'].value:.0f} %, copies 100 %"
        title = f"Nearer to a training image than its own neighbour, {name}"
        metrics.append(_row(title, evaluation, "memorised_fraction", "%", at_most=60.0, comment=comment))
    metrics.append(_diversity(memory["guided"], data))
    assert data.train.images is not None
    index, distances = nearest(memory["guided"].samples.rows[:SHOWN].double(), data.train.images.rows.double())
    return Results(metrics, memory["guided"], data, index.tolist(), distances.tolist(), film)


def _evaluate(
    samples: Pictures, reference: Reference, train: Reference | None = None, evaluator: Any = None
) -> Evaluation:
    return protocol.evaluate(samples, reference, Pixels(), train, evaluator)


def _as_pictures(name: str, samples: Samples) -> Pictures:
    images, labels = samples.images, [str(label) for label in samples.labels or ()]
    sampling = {key: value for key, value in samples.metadata.items() if key not in UNSTAMPED}
    return Pictures(name, len(images), lambda rows: images[rows.start : rows.stop], labels=labels, sampling=sampling)


def _pictures(reference: Reference) -> Pictures:
    assert reference.pictures is not None  # the digits are images
    return reference.pictures


def _row(name: str, evaluation: Evaluation, metric: str, unit: str = "", **target: Any) -> MetricRow:
    """A metric of an evaluation with its target; fractions are shown in per cent."""
    measured = evaluation.metrics[metric]
    decimals, scale = (1, 100) if unit == "%" else (3, 1)
    return MetricRow(
        name, scale * measured.value, unit, decimals, _ends(measured, scale), protocol=measured.stamp.text(), **target
    )


def _ends(measured: Measurement, scale: float) -> tuple[float, float] | None:
    ends = measured.interval
    return None if ends is None else (scale * ends.low, scale * ends.high)


def _diversity(evaluation: Evaluation, data: Digits) -> MetricRow:
    """The standard deviation within a class, over that of the real digits."""
    scale = 1 / class_std(data.images, torch.tensor(data.labels))
    measured = evaluation.metrics["class_std"]
    return MetricRow(
        "Standard deviation within a class, guided, over the real one",
        scale * measured.value,
        interval=_ends(measured, scale),
        at_least=0.6,
        protocol=f"mean standard deviation of a pixel within a class; {measured.stamp.text()}",
    )


def film_of(model: DiffusionModel, steps: int) -> tuple[Tensor, Tensor, list[float]]:
    """One picture (a 3) being denoised: x_t, x̂_0 and t at nine moments."""
    frames: list[tuple[Tensor, Tensor, float]] = []
    starts = [t for t, _ in model.grid(steps).pairs()]

    def record(step: Step, low: int) -> None:
        frames.append((step.prediction.x[:1].cpu(), step.prediction.x0[:1].cpu(), starts[step.index]))

    result = model.sample([3], steps=steps, seed=0, on_step=record)
    frames.append((result.images, result.images, 0.0))
    chosen = [frames[round(i * (len(frames) - 1) / 8)] for i in range(9)]
    noisy, clean, times = zip(*chosen, strict=True)
    return torch.cat(noisy), torch.cat(clean), list(times)
