"""Every figure of a set of samples, with its interval and its stamp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from carrara.evaluation.bootstrap import mean_interval, median_interval
from carrara.evaluation.clip_score import clip_score, retrieval
from carrara.evaluation.collect import Collected
from carrara.evaluation.evaluator import class_accuracy
from carrara.evaluation.frechet import frechet_distance, frechet_interval
from carrara.evaluation.inception_score import inception_score
from carrara.evaluation.infinity import frechet_infinity
from carrara.evaluation.kernel import KernelEstimate, as_pair
from carrara.evaluation.manifold import Balls
from carrara.evaluation.memorisation import class_std, class_std_interval, memorisation
from carrara.evaluation.moments import Rows, Statistics
from carrara.evaluation.pictures import refuse_other_shape
from carrara.evaluation.products import Sets
from carrara.evaluation.stamp import Measurement, Measurements, Stamp

FID_FEATURES = "inception-2015"
"""The only features whose Fréchet distance is called FID, and whose kernel distance KID."""


def frechet_name(features: str) -> str:
    """What a Fréchet distance in these features may be called."""
    return "fid" if features == FID_FEATURES else "frechet_distance"


def kernel_name(features: str) -> str:
    """What a kernel distance in these features may be called."""
    return "kid" if features == FID_FEATURES else "kernel_distance"


def measure_frechet(samples: Collected, reference: Collected | Statistics, stamp: Stamp, seed: int = 0) -> Measurements:
    """The Fréchet distance and, where there are enough samples, its extrapolation to infinitely many.

    The interval needs the samples' rows; where only the first were kept there is none.
    """
    if isinstance(reference, Collected):
        refuse_other_shape("the samples", samples.shape, "the reference", reference.shape)
    known = reference if isinstance(reference, Statistics) else reference.statistics
    count, dimension = samples.statistics.count or 0, len(samples.statistics.mean)
    whole = len(samples.rows) == count
    value = frechet_distance(samples.statistics, known)
    interval = frechet_interval(samples.rows, known, seed=seed) if whole else None
    name = frechet_name(stamp.features)
    note = _few(count, dimension)
    metrics = {name: Measurement(value, interval, stamp, note)}
    if whole and count > 1.2 * dimension:
        beyond = frechet_infinity(samples.rows, known, seed=seed)
        metrics[f"{name}_infinity"] = Measurement(beyond.value, beyond.interval, stamp.with_settings(groups=10))
    return metrics


NEIGHBOURS = 5
"""The largest k of the metrics of nearest neighbours."""


def _few(count: int, dimension: int) -> str:
    """The note on a Fréchet distance of no more samples than dimensions."""
    if count > dimension:
        return ""
    return f"{count:,} samples for {dimension:,} dimensions: far too large a value, comparable at equal n only"


def measure_pairs(samples: Collected, reference: Collected, stamp: Stamp, seed: int = 0) -> Measurements:
    """Kernel distance, precision, recall, density and coverage of the rows that were kept; of too few rows for their
    nearest neighbours the kernel distance alone, as its note states."""
    refuse_other_shape("the samples", samples.shape, "the reference", reference.shape)
    x, y = samples.rows, reference.rows
    stamp = stamp.with_settings(rows=len(x), reference_rows=len(y))
    sets = Sets.of(*as_pair(x, y))
    estimate = KernelEstimate(sets, seed=seed)
    balls = Balls(sets) if min(len(x), len(y)) > NEIGHBOURS else None
    sets.visit(estimate, *(() if balls is None else (balls,)))  # once for both: the products are nearly all of the work
    kernel = estimate.result()
    note = f"mean of subsets {kernel.mean:.3g} ± {kernel.std:.2g}"
    if balls is None:
        note += f"; precision, recall, density and coverage need more than {NEIGHBOURS} images a side"
    subsets = stamp.with_settings(subset_size=kernel.subset_size)
    measured = {kernel_name(stamp.features): Measurement(kernel.full, kernel.interval, subsets, note)}
    if balls is None:
        return measured
    manifold, cover = balls.result(seed)
    three, five = stamp.with_settings(k=3), stamp.with_settings(k=NEIGHBOURS)
    return measured | {
        "precision": Measurement(manifold.precision, manifold.precision_interval, three),
        "recall": Measurement(manifold.recall, manifold.recall_interval, three),
        "density": Measurement(cover.density, cover.density_interval, five),
        "coverage": Measurement(cover.coverage, cover.coverage_interval, five),
    }


def measure_inception_score(logits: Rows, stamp: Stamp, splits: int = 10, seed: int = 0) -> Measurements:
    """The Inception score of the FID network's logits; of any other network its class score."""
    score = inception_score(logits, splits, seed)
    name = "inception_score" if stamp.features == FID_FEATURES else "class_score"
    note = f"mean of {splits} splits {score.mean:.4g} ± {score.std:.2g}"
    return {name: Measurement(score.full, score.interval, stamp.with_settings(splits=splits), note)}


def measure_memory(samples: Rows, train: Rows, held_out: Rows, stamp: Stamp, seed: int = 0) -> Measurements:
    """Whether the training images were memorised: two fractions and two medians of distance ratios."""
    found = memorisation(samples, train, held_out, seed)
    return {
        "memorised_fraction": Measurement(found.fraction, found.interval, stamp),
        "memorised_fraction_held_out": Measurement(found.held_out_fraction, found.held_out_interval, stamp),
        "distance_ratio": Measurement(
            float(found.ratios.quantile(0.5)), median_interval(found.ratios, seed=seed), stamp
        ),
        "distance_ratio_held_out": Measurement(
            float(found.held_out_ratios.quantile(0.5)), median_interval(found.held_out_ratios, seed=seed), stamp
        ),
    }


def measure_diversity(images: Tensor, labels: Tensor, stamp: Stamp, seed: int = 0) -> Measurements:
    """The standard deviation within the classes, labels int64 [N], of images or features [N, …]."""
    interval = class_std_interval(images, labels, seed=seed)
    return {"class_std": Measurement(class_std(images, labels), interval, stamp)}


def measure_accuracy(predicted: Tensor, requested: Tensor, stamp: Stamp, seed: int = 0) -> Measurements:
    """How many samples show the requested class to an evaluator, both int64 [N], with the table of confusions."""
    accuracy = class_accuracy(predicted, requested, seed)
    details = {"confusion": accuracy.confusion.tolist()}
    return {"class_accuracy": Measurement(accuracy.fraction, accuracy.interval, stamp, details=details)}


def measure_each_class(
    rows: Tensor,
    labels: Tensor,
    predicted: Tensor | None,
    real: Tensor,
    real_labels: Tensor,
    names: Sequence[str],
    stamp: Stamp,
    seed: int = 0,
) -> Measurements:
    """The metrics of every class alone, named "metric[class]": Fréchet distance to the real ones of the class,
    standard deviation, and how many show the class.

    Args:
        rows, real: features of samples [N, D] and of the reference [M, D].
        labels, real_labels: int64, their classes, into `names`.
        predicted: int64 [N], the classes that an evaluator predicts, or None.
    """
    metrics: Measurements = {}
    for label in labels.unique().tolist():
        own, others = rows[labels == label], real[real_labels == label]
        about = replace(stamp, n=len(own), reference_n=len(others)).with_settings(of_class=names[label])
        note = _few(len(own), rows.shape[1])
        if min(len(own), len(others)) > 1:
            metrics[f"{frechet_name(stamp.features)}[{names[label]}]"] = Measurement(
                frechet_distance(own, others), frechet_interval(own, others, seed=seed), about, note
            )
        same = torch.zeros(len(own), dtype=torch.int64)
        metrics[f"class_std[{names[label]}]"] = Measurement(
            class_std(own, same), class_std_interval(own, same, seed=seed), about
        )
        if predicted is not None:
            right = (predicted[labels == label] == label).double()
            metrics[f"class_accuracy[{names[label]}]"] = Measurement(
                float(right.mean()), mean_interval(right, seed=seed), about
            )
    return metrics


def measure_captions(images: Tensor, texts: Tensor, stamp: Stamp, seed: int = 0) -> Measurements:
    """CLIP score and caption retrieval of image embeddings [N, D] and their captions' [N, D]."""
    score, found = clip_score(images, texts, seed), retrieval(images, texts, seed=seed)
    metrics = {"clip_score": Measurement(score.score, score.interval, stamp)}
    for k, recall in found.recall.items():
        metrics[f"caption_recall_at_{k}"] = Measurement(recall, found.intervals[k], stamp)
    return metrics
