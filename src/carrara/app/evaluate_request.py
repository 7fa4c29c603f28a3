"""What can be measured, and which inputs contradict each other or would change nothing: refused before any reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from carrara import weights
from carrara.app.models import is_codec
from carrara.app.request import Request, Resolution, check_file, check_folder
from carrara.data.preprocess import Resize
from carrara.errors import UserError, nearest


class Measure(Request):
    """Samples of a model, or finished ones, against real images.

    Attributes:
        subject: a run or model folder, a codec's folder, or images: a folder, npz or data set.
        reference, reference_split: real images, or a file of their statistics.
        features, checksum: the feature network, and the SHA-256 of an Inception file that is not one of 2015's.
        n: how many samples; None is all, of a model as many as real images, 10,000 at most.
        resolution, channels, resize: to what images that are read are brought.
        train, train_split: the training images, for memorisation.
        evaluator: what predicts the classes of samples: "svc", fitted to the reference, or a trained classifier.
        per_class: whether the metrics of each class are wanted, too.
        classes: of samples: "turn", or "reference": in the reference's proportions, the default where they are known.
        steps, solver, guidance, classifier, classifier_scale, eta, spacing, seed: as of `DiffusionModel.sample`.
        batch_size: samples computed at once.
        device, precision: "auto", or as of `carrara.devices`.
    """

    subject: str
    reference: str | None = None
    reference_split: str = "train"
    features: str = "pixels"
    checksum: str | None = None
    n: int | None = Field(None, ge=1)
    resolution: Resolution | None = None
    channels: Literal[1, 3, 4] | None = None
    resize: Resize = "adm"
    train: str | None = None
    train_split: str = "train"
    evaluator: str | None = None
    per_class: bool = False
    classes: str | None = None
    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    classifier: str | None = None
    classifier_scale: float | None = None
    eta: float | None = None
    spacing: str | None = None
    seed: int = 0
    batch_size: int = Field(64, ge=1)
    device: str = "auto"
    precision: str = "auto"

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of `DiffusionModel.sample`."""
        names = ("steps", "solver", "guidance", "eta", "spacing", "seed")
        scale = {} if self.classifier_scale is None else {"classifier_scale": self.classifier_scale}
        return {name: getattr(self, name) for name in names} | scale


class EvaluateRequest(Measure):
    """Every metric of a subject.

    Attributes:
        split: which part of finished samples.
        held_out, held_out_split, held_out_n: images that a model never saw, for its bits per dimension.
        variance: of the bound's reverse steps: small, large, learned.
        originals, originals_split: what the samples should be, one by one; of a codec or latent model, what is
            encoded and decoded.
        lpips, lpips_checksum: weights of LPIPS on VGG-16, for `originals`.
        captions: a file of lines that describe each sample, for CLIP features.
        report: the page to write, with the tables in the folders `tables`.
        out: the JSON file to write.
    """

    split: str = "train"
    held_out: str | None = None
    held_out_split: str = "test"
    held_out_n: int | None = Field(None, ge=1)
    variance: str | None = None
    originals: str | None = None
    originals_split: str = "train"
    lpips: str | None = None
    lpips_checksum: str | None = None
    captions: Path | None = None
    report: Path | None = None
    tables: tuple[Path, ...] = ()
    out: Path | None = None


class SweepRequest(Measure):
    """One model sampled in many ways.

    Attributes:
        table: "ddim", "guidance" or "solvers".
        out: the folder of the table; a table that was interrupted there is continued.
    """

    reference: str
    table: str
    out: Path


SAMPLING = {"classes", "steps", "solver", "guidance", "classifier", "eta", "spacing"}
MODEL = SAMPLING | {"classifier_scale", "seed", "batch_size", "precision"}
READING = {"resolution", "channels"}
ALWAYS = {"n", "out", "device", "resize", *READING}
CODEC = {"originals", "originals_split", "lpips", "lpips_checksum"}
CODEC |= {"reference", "reference_split", "features", "checksum"}
NEEDS = {
    "reference_split": "reference",
    "train": "reference",
    "train_split": "train",
    "evaluator": "reference",
    "per_class": "reference",
    "captions": "reference",
    "features": "reference",
    "checksum": "features",
    "classifier_scale": "classifier",
    "report": "reference",
    "tables": "report",
    "held_out_split": "held_out",
    "held_out_n": "held_out",
    "variance": "held_out",
    "originals_split": "originals",
    "lpips": "originals",
    "lpips_checksum": "lpips",
    "resize": "resolution",
    **dict.fromkeys(SAMPLING, "reference"),
}
"""Inputs that mean nothing without another."""


def refuse(request: EvaluateRequest | SweepRequest) -> None:
    """Raises UserError for inputs that cannot be followed, that would change nothing, or that cannot be written."""
    given = request.model_fields_set
    if isinstance(request, EvaluateRequest) and not given & {"reference", "held_out", "originals"}:
        raise UserError(
            "there is nothing to measure against: give --reference DATA, --held-out DATA or --originals DATA.",
            key="reference",
            code="missing",
        )
    for name in sorted(given & NEEDS.keys()):
        if NEEDS[name] not in given:
            raise _conflict({name}, f"it belongs to {spelt({NEEDS[name]})}, so give both, or leave it out")
    _refuse_words(request)
    _refuse_subject(request)
    if isinstance(request, SweepRequest):
        _refuse_table(request)
        check_folder(request.out, "out")
    else:
        _refuse_statistics(request)
        check_file(request.out, "out")
        check_file(request.report, "report")


def spelt(names: set[str]) -> str:
    """Fields as the command line spells them."""
    words = {"subject": "MODEL|SAMPLES"}
    return ", ".join(sorted(words.get(name, f"--{name.replace('_', '-')}") for name in names))


def _conflict(names: set[str], sentence: str) -> UserError:
    return UserError(f"{spelt(names)}: {sentence}.", key=min(names), code="conflict")


def _unknown(key: str, word: str, known: tuple[str, ...]) -> UserError:
    return UserError(f"--{key} knows no '{word}': {nearest(word, known)}", key=key, code="unknown")


def _refuse_words(request: EvaluateRequest | SweepRequest) -> None:
    from carrara.process.transitions import ReverseVariance
    from carrara.solvers import named

    if request.evaluator not in (None, "svc") and not weights.holds(request.evaluator):
        raise UserError(
            f"there is no evaluator '{request.evaluator}': give svc, or the run folder of a trained classifier.",
            key="evaluator",
            code="missing",
        )
    if request.classes not in (None, "turn", "reference"):
        raise _unknown("classes", request.classes, ("turn", "reference"))
    if request.solver is not None:
        named(request.solver)
    if isinstance(request, SweepRequest):
        return
    if request.variance is not None and request.variance not in get_args(ReverseVariance):
        raise _unknown("variance", request.variance, get_args(ReverseVariance))
    if request.captions is not None and not request.features.startswith("clip="):
        raise _conflict({"captions"}, "they are compared by CLIP, so give --features clip=FOLDER")
    if request.captions is not None and not request.captions.is_file():
        raise UserError(f"there is no file '{request.captions}' of captions.", key="captions", code="missing")


def _refuse_subject(request: EvaluateRequest | SweepRequest) -> None:
    given, subject = request.model_fields_set, request.subject
    if is_codec(subject):
        if "originals" not in given or given - {"subject", *CODEC, *ALWAYS}:
            raise UserError(
                f"{subject} is a codec, which makes no pictures by itself: give --originals DATA to encode and decode, "
                "and --reference DATA for the distance of the result.",
                key="subject",
                code="conflict",
            )
        return
    if weights.holds(subject):
        if "split" in given:
            raise _conflict({"split"}, f"only for finished samples, and {subject} is a model")
        return
    if given & MODEL:
        raise _conflict(given & MODEL, f"only for models, and {subject} is no run or model folder")
    if "held_out" in given:
        raise _conflict({"held_out"}, f"only a model predicts bits, and {subject} is no run or model folder")
    if isinstance(request, SweepRequest):
        raise UserError(
            f"a sweep samples a model in many ways, and {subject} is no run or model folder.",
            key="subject",
            code="missing",
        )


def _refuse_statistics(request: EvaluateRequest) -> None:
    from carrara.evaluation.reference import holds_images, holds_statistics

    given, reference = request.model_fields_set, request.reference
    if reference is None or not holds_statistics(reference) or holds_images(reference):
        return
    nothing_read = weights.holds(request.subject) and not given & {"train", "held_out", "originals"}
    unused = given & ({"reference_split", *READING} if nothing_read else {"reference_split"})
    if unused:
        raise _conflict(unused, f"only for images, and {reference} contains their statistics")


def _refuse_table(request: SweepRequest) -> None:
    from carrara.evaluation.tables import TABLES

    if request.table not in TABLES:
        raise _unknown("table", request.table, tuple(TABLES))
    if varied := request.model_fields_set & TABLES[request.table]:
        raise _conflict(varied, f"the table {request.table} varies it, so leave it out")
