"""What is measured of samples: every metric whose needs are met, each with its interval and its protocol.

Features are computed by all processes together; the first computes the metrics and sends them to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from carrara.classifier import Classifier
from carrara.distributed import run_on_rank0
from carrara.errors import UserError, nearest
from carrara.evaluation import evaluator as svcs
from carrara.evaluation.collect import Collected, collect_together
from carrara.evaluation.features import Features, Inception
from carrara.evaluation.measure import (
    measure_accuracy,
    measure_captions,
    measure_diversity,
    measure_each_class,
    measure_frechet,
    measure_inception_score,
    measure_memory,
    measure_pairs,
)
from carrara.evaluation.pictures import Pictures, refuse_other_shape
from carrara.evaluation.reference import Progress, Reference, features_of
from carrara.evaluation.stamp import Measurements, Stamp

Evaluator = Literal["svc"] | Classifier
"""What predicts the classes of samples: an SVC fitted to the reference, or a trained classifier."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a set of samples.

    Attributes:
        metrics: every metric, with its interval and protocol.
        samples: their features, and the first of them as pictures.
        labels: the names of their classes, or None.
        notices: what was left out, and why.
    """

    metrics: Measurements
    samples: Collected
    labels: list[str] | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """What metrics are computed from.

    Attributes:
        pictures: the samples; once their features are computed, `samples` and `stamp` are there, too.
        reference: the real pictures.
        features: the feature network.
        train: the training images, or None.
        evaluator: what predicts the samples' classes, or None.
        per_class: whether the metrics of each class are wanted.
    """

    pictures: Pictures
    reference: Reference
    features: Features
    train: Reference | None = None
    evaluator: Evaluator | None = None
    per_class: bool = False

    @property
    def there(self) -> set[str]:
        """The words of `NEEDS` that are met."""
        from carrara.evaluation.features.pretrained import Clip

        met = {
            "reference images": self.reference.images is not None,
            "reference classes": self.reference.images is not None and self.reference.labels is not None,
            "classes": self.pictures.labels is not None,
            "train": self.train is not None,
            "evaluator": self.evaluator is not None,
            "per_class": self.per_class,
            "captions": self.pictures.captions is not None and isinstance(self.features, Clip),
            "logits": isinstance(self.features, Inception),
        }
        return {word for word, is_met in met.items() if is_met}

    def refuse(self) -> None:
        """Raises UserError for training images, an evaluator or single classes that could not be followed."""
        if self.evaluator == "svc":
            _refuse_unless({"reference images", "reference classes"}, self, "evaluator")
        for metric in METRICS.values():
            for option in sorted(metric.needs & self.there & OPTIONS):
                _refuse_unless(metric.needs - OPTIONS, self, option)
        if self.train is not None:
            _refuse_training(self.train, self.reference)
        if self.evaluator is not None:
            _refuse_evaluator(self.pictures, self.reference, self.evaluator)


OPTIONS = {"train", "evaluator", "per_class"}
"""Needs that a user names."""

NEEDS = {
    "reference images": "a --reference of images, not of their statistics",
    "reference classes": "a --reference with classes",
    "classes": "samples with classes",
    "train": "--train",
    "evaluator": "--evaluator",
    "per_class": "--per-class",
    "captions": "samples with captions, and CLIP features",
    "logits": "Inception features",
}


@dataclass(frozen=True)
class Seen:
    """Inputs whose features are computed."""

    inputs: Inputs
    samples: Collected
    stamp: Stamp

    @property
    def labels(self) -> list[str]:
        """The classes of the rows."""
        return (self.inputs.pictures.labels or [])[: len(self.samples.rows)]

    @property
    def of_classes(self) -> Stamp:
        """The protocol of metrics of classes."""
        return self.stamp.with_settings(rows=len(self.labels))

    @cached_property
    def names(self) -> list[str]:
        """All classes that occur, in order: what numbers stand for."""
        evaluator = self.inputs.evaluator
        known = evaluator.names if isinstance(evaluator, Classifier) else ()
        return sorted({*self.labels, *(self.inputs.reference.labels or ()), *known})

    def numbers(self, labels: list[str]) -> Tensor:
        """Classes as places in `names`, int64 [N]."""
        places = {name: index for index, name in enumerate(self.names)}
        return torch.tensor([places[label] for label in labels])

    @cached_property
    def predicted(self) -> tuple[Tensor | None, dict[str, Any]]:
        """The classes that the evaluator predicts, as places in `names`, int64 [N], and what a stamp names of it."""
        evaluator, reference = self.inputs.evaluator, self.inputs.reference
        if evaluator is None:
            return None, {}
        if isinstance(evaluator, Classifier):
            assert self.samples.classes is not None
            numbers = self.numbers([evaluator.names[i] for i in self.samples.classes.tolist()])
            return numbers, {"evaluator": f"classifier, {evaluator.origin}".rstrip(", ")}
        assert reference.images is not None  # refused before
        real = self.numbers(reference.labels or [])
        about = {"evaluator": f"{svcs.SVC} on the reference's features", "evaluator_rows": len(real)}
        return svcs.svc(reference.images.rows, real)(self.samples.rows), about


@dataclass(frozen=True)
class Metric:
    """A metric, or several that share their work.

    Attributes:
        measure: computes it.
        needs: words of `NEEDS`; it is left out where one is not met.
        least: samples that it needs; with fewer it is left out.
    """

    measure: Callable[[Seen], Measurements]
    needs: frozenset[str] = frozenset()
    least: int = 2


def _frechet(seen: Seen) -> Measurements:
    return measure_frechet(seen.samples, seen.inputs.reference.statistics, seen.stamp)


def _pairs(seen: Seen) -> Measurements:
    assert seen.inputs.reference.images is not None
    return measure_pairs(seen.samples, seen.inputs.reference.images, seen.stamp)


def _inception_score(seen: Seen) -> Measurements:
    assert isinstance(seen.inputs.features, Inception)
    return measure_inception_score(seen.inputs.features.logits(seen.samples.rows), seen.stamp)


def _memory(seen: Seen) -> Measurements:
    train, held_out = seen.inputs.train, seen.inputs.reference
    assert train is not None
    assert train.images is not None
    assert held_out.images is not None
    rows = seen.samples.rows
    about = seen.stamp.with_settings(
        train=Path(train.name).name, train_split=train.split, train_hash=train.content, rows=len(rows)
    )
    return measure_memory(rows, train.images.rows, held_out.images.rows, about)


def _diversity(seen: Seen) -> Measurements:
    return measure_diversity(seen.samples.rows, seen.numbers(seen.labels), seen.of_classes)


def _accuracy(seen: Seen) -> Measurements:
    predicted, about = seen.predicted
    assert predicted is not None
    return measure_accuracy(predicted, seen.numbers(seen.labels), seen.of_classes.with_settings(**about))


def _each_class(seen: Seen) -> Measurements:
    reference = seen.inputs.reference
    assert reference.images is not None
    labels, real_labels = (seen.numbers(labels or []) for labels in (seen.labels, reference.labels))
    predicted, about = seen.predicted
    real = reference.images.rows
    metrics = measure_each_class(seen.samples.rows, labels, predicted, real, real_labels, seen.names, seen.of_classes)
    return {
        name: replace(metric, stamp=metric.stamp.with_settings(**about)) if "accuracy" in name else metric
        for name, metric in metrics.items()
    }


def _captions(seen: Seen) -> Measurements:
    clip: Any = seen.inputs.features
    texts = (seen.inputs.pictures.captions or [])[: len(seen.samples.rows)]
    embedded = torch.cat([clip.texts(texts[low : low + 256]).cpu() for low in range(0, len(texts), 256)])
    return measure_captions(seen.samples.rows, embedded, seen.stamp.with_settings(rows=len(texts)))


METRICS = {
    "Fréchet distance": Metric(_frechet),
    "metrics of pairs": Metric(_pairs, frozenset({"reference images"})),
    "Inception score": Metric(_inception_score, frozenset({"logits"}), least=10),
    "memorisation": Metric(_memory, frozenset({"train", "reference images"})),
    "diversity within classes": Metric(_diversity, frozenset({"classes"})),
    "accuracy": Metric(_accuracy, frozenset({"classes", "evaluator"})),
    "each class": Metric(_each_class, frozenset({"per_class", "classes", "reference images", "reference classes"})),
    "captions": Metric(_captions, frozenset({"captions"})),
}
"""Every metric of samples, in the order of their output."""


def evaluate(
    samples: Pictures,
    reference: Reference,
    features: Features,
    train: Reference | None = None,
    evaluator: Evaluator | None = None,
    per_class: bool = False,
    progress: Progress | None = None,
    on_metric: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Every one of `METRICS` that these inputs allow, each with its interval and its protocol.

    Args:
        train: the training images, for memorisation; the reference is then what "not memorised" looks like.
        evaluator: predicts the samples' classes.
        per_class: whether the metrics of single classes are wanted too.
        progress: called after each batch of samples with how many it contains.
        on_metric: called before each metric with its name, how many are done, and of how many.

    Raises:
        UserError: sets of other sizes, colour modes or features, too few pictures, no images where only
            statistics are known, training images that are the reference, classes that the two do not have in common.
    """
    inputs = Inputs(samples, reference, features, train, evaluator, per_class)
    inputs.refuse()
    classify = evaluator.read if isinstance(evaluator, Classifier) else None

    def check(images: Tensor) -> None:
        _refuse_unlike(images, reference, features)

    collected = collect_together(samples, features, check=check, classify=classify, progress=progress)
    seen = Seen(inputs, collected, stamp_of(samples, reference, features, collected))
    fitting = {name: metric for name, metric in METRICS.items() if metric.needs <= inputs.there}
    count = collected.statistics.count or 0
    notices = [
        f"{name} needs {metric.least} samples and is left out: there are {count}."
        for name, metric in fitting.items()
        if count < metric.least
    ]

    def metrics() -> Measurements:
        measured: Measurements = {}
        for done, (name, metric) in enumerate(fitting.items()):
            if on_metric is not None:
                on_metric(name, done, len(fitting))
            if count >= metric.least:
                measured |= metric.measure(seen)
        return measured

    return Evaluation(run_on_rank0(metrics), collected, samples.labels, tuple(notices))


def stamp_of(samples: Pictures, reference: Reference, features: Features, collected: Collected) -> Stamp:
    """The protocol that all metrics of the samples share."""
    assert collected.statistics.count is not None
    return Stamp(
        n=collected.statistics.count,
        shape=collected.shape,
        resize=reference.resize,
        reference=Path(reference.name).name,
        reference_split=reference.split,
        reference_hash=reference.content,
        reference_n=reference.count,
        sampling=dict(samples.sampling),
        **features_of(features),
    )


# ---- what is refused ----------------------------------------------------------------------------------------


def _refuse_unless(needs: set[str] | frozenset[str], inputs: Inputs, option: str) -> None:
    for need in sorted(needs - inputs.there):
        who = inputs.pictures.name if need == "classes" else inputs.reference.name
        raise UserError(f"{NEEDS[option]} needs {NEEDS[need]}, unlike {who}.", key=option, code="mismatch")


def _refuse_unlike(images: Tensor, reference: Reference, features: Features) -> None:
    """Raises UserError where samples, seen in a first batch, are not comparable with the reference."""
    if reference.images is not None:
        refuse_other_shape("the samples", images.shape[1:], f"the reference {reference.name}", reference.images.shape)
        return
    dimension = features(images[:1]).shape[1]
    if len(reference.statistics.mean) != dimension:
        raise UserError(
            f"{reference.name} contains statistics of {len(reference.statistics.mean)} dimensions, the features "
            f"'{features.name}' have {dimension}: compute the reference with the features in use.",
            key="features",
            code="mismatch",
        )


def _refuse_training(train: Reference, reference: Reference) -> None:
    if train.content == reference.content:
        raise UserError(
            f"the training images {train.name} are the reference itself: give held-out images as --reference.",
            key="train",
            code="conflict",
        )
    assert train.images is not None
    assert reference.images is not None
    own, other = train.images.shape, reference.images.shape
    refuse_other_shape(f"the training images {train.name}", own, f"the reference {reference.name}", other)


def _refuse_evaluator(samples: Pictures, reference: Reference, evaluator: Evaluator) -> None:
    known = evaluator.names if isinstance(evaluator, Classifier) else tuple(reference.labels or ())
    unknown = sorted(set(samples.labels or ()) - set(known))
    if unknown:
        raise UserError(
            f"the evaluator knows no class '{unknown[0]}': {nearest(unknown[0], set(known))}",
            key="evaluator",
            code="mismatch",
        )
    if len(set(known)) < 2:
        raise UserError(
            f"an evaluator separates classes, and {reference.name} has only one.", key="evaluator", code="mismatch"
        )
