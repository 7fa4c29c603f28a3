"""Every figure of a set of samples, with its interval and its stamp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import mean_interval, median_interval
from carrara.evaluation.clip_score import clip_score, retrieval
from carrara.evaluation.collect import Collected
from carrara.evaluation.frechet import frechet_distance, frechet_interval
from carrara.evaluation.inception_score import inception_score
from carrara.evaluation.infinity import frechet_infinity
from carrara.evaluation.judge import class_accuracy
from carrara.evaluation.kernel import KernelEstimate, as_pair
from carrara.evaluation.manifold import Balls
from carrara.evaluation.memorisation import class_spread, class_spread_interval, memorisation
from carrara.evaluation.moments import Rows, Statistics
from carrara.evaluation.products import Sets
from carrara.evaluation.stamp import Measurement, Measurements, Stamp
from carrara.similarity import HIGHEST_PSNR

FID_FEATURES = "inception-2015"
"""The only features whose Fréchet distance is called FID, and whose kernel distance KID."""


def frechet_name(features: str) -> str:
    """What a Fréchet distance in these features may be called."""
    return "fid" if features == FID_FEATURES else "frechet_distance"


def kernel_name(features: str) -> str:
    """What a kernel distance in these features may be called."""
    return "kid" if features == FID_FEATURES else "kernel_distance"


def same_pictures(samples: Collected, reference: Collected | Statistics) -> None:
    """Refuses a reference of another resolution or colour mode, which any feature network would resize away.

    Raises:
        UserError: the two shapes.
    """
    if isinstance(reference, Collected) and samples.shape != reference.shape:
        ours, theirs = ("×".join(map(str, shape)) for shape in (samples.shape, reference.shape))
        raise UserError(
            f"samples are {ours} (channels, height, width) and the reference is {theirs}: "
            "read the reference at the samples' resolution and colour mode."
        )


def measure_frechet(samples: Collected, reference: Collected | Statistics, stamp: Stamp, seed: int = 0) -> Measurements:
    """The Fréchet distance and, where there are enough samples, its extrapolation to infinitely many.

    The interval needs the samples' rows; where only the first were kept there is none.
    """
    same_pictures(samples, reference)
    known = reference if isinstance(reference, Statistics) else reference.moments.statistics()
    whole = len(samples.rows) == samples.moments.count
    value = frechet_distance(samples.moments, known)
    interval = frechet_interval(samples.rows, known, seed=seed) if whole else None
    name = frechet_name(stamp.features)
    note = _few(samples.moments.count, samples.moments.dimension)
    figures = {name: Measurement(value, interval, stamp, note)}
    if whole and samples.moments.count > 1.2 * samples.moments.dimension:
        beyond = frechet_infinity(samples.rows, known, seed=seed)
        figures[f"{name}_infinity"] = Measurement(beyond.value, beyond.interval, stamp.with_settings(groups=10))
    return figures


NEIGHBOURS = 5
"""The largest k of the metrics of nearest neighbours."""


def _few(count: int, dimension: int) -> str:
    """What must be said of a Fréchet distance of no more samples than dimensions."""
    if count > dimension:
        return ""
    return f"{count:,} samples for {dimension:,} dimensions: far too large a value, comparable at equal n only"


def measure_pairs(samples: Collected, reference: Collected, stamp: Stamp, seed: int = 0) -> Measurements:
    """Kernel distance, precision, recall, density and coverage of the rows that were kept; of too few rows for their
    nearest neighbours the kernel distance alone, as its note states."""
    same_pictures(samples, reference)
    x, y = samples.rows, reference.rows
    stamp = stamp.with_settings(rows=len(x), reference_rows=len(y))
    sets = Sets.of(*as_pair(x, y))
    estimate = KernelEstimate(sets, seed=seed)
    balls = Balls(sets) if min(len(x), len(y)) > NEIGHBOURS else None
    sets.walk(estimate, *(() if balls is None else (balls,)))  # once for both: the products are nearly all of the work
    kernel = estimate.result()
    note = f"mean of subsets {kernel.mean:.3g} ± {kernel.spread:.2g}"
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
    """The Inception score of the FID network's logits; with any other judge's, its class score."""
    score = inception_score(logits, splits, seed)
    name = "inception_score" if stamp.features == FID_FEATURES else "class_score"
    note = f"mean of {splits} splits {score.mean:.4g} ± {score.spread:.2g}"
    return {name: Measurement(score.full, score.interval, stamp.with_settings(splits=splits), note)}


def measure_memory(samples: Rows, train: Rows, held_out: Rows, stamp: Stamp, seed: int = 0) -> Measurements:
    """Whether the training images were learnt by heart: two shares and two medians of distance ratios."""
    found = memorisation(samples, train, held_out, seed)
    return {
        "memorised_share": Measurement(found.share, found.interval, stamp),
        "memorised_share_held_out": Measurement(found.held_out_share, found.held_out_interval, stamp),
        "distance_ratio": Measurement(
            float(found.ratios.quantile(0.5)), median_interval(found.ratios, seed=seed), stamp
        ),
        "distance_ratio_held_out": Measurement(
            float(found.held_out_ratios.quantile(0.5)), median_interval(found.held_out_ratios, seed=seed), stamp
        ),
    }


def measure_classes(images: Tensor, labels: Tensor, read: Tensor | None, stamp: Stamp, seed: int = 0) -> Measurements:
    """Diversity within a class and, where a judge has `read` the images (int64 [N]), how many show what was asked."""
    figures = {
        "class_spread": Measurement(
            class_spread(images, labels), class_spread_interval(images, labels, seed=seed), stamp
        )
    }
    if read is not None:
        accuracy = class_accuracy(read, labels, seed)
        figures["class_accuracy"] = Measurement(
            accuracy.share, accuracy.interval, stamp, details={"confusion": accuracy.confusion.tolist()}
        )
    return figures


def measure_each_class(
    rows: Tensor,
    labels: Tensor,
    read: Tensor | None,
    real: Tensor,
    real_labels: Tensor,
    names: Sequence[str],
    stamp: Stamp,
    seed: int = 0,
) -> Measurements:
    """The figures of every class alone, named "figure[class]": Fréchet distance to the real ones of the class,
    spread, and how many show what was asked.

    Args:
        rows, real: features of samples [N, D] and of the reference [M, D].
        labels, real_labels: int64, their classes, into `names`.
        read: int64 [N], what a judge read, or None.
    """
    figures: Measurements = {}
    for label in labels.unique().tolist():
        own, others = rows[labels == label], real[real_labels == label]
        about = replace(stamp, n=len(own), reference_n=len(others)).with_settings(of_class=names[label])
        note = _few(len(own), rows.shape[1])
        if min(len(own), len(others)) > 1:
            figures[f"{frechet_name(stamp.features)}[{names[label]}]"] = Measurement(
                frechet_distance(own, others), frechet_interval(own, others, seed=seed), about, note
            )
        same = torch.zeros(len(own), dtype=torch.int64)
        told = None if read is None else (read[labels == label] == label).long()
        figures[f"class_spread[{names[label]}]"] = Measurement(
            class_spread(own, same), class_spread_interval(own, same, seed=seed), about
        )
        if told is not None:
            figures[f"class_accuracy[{names[label]}]"] = Measurement(
                float(told.double().mean()), mean_interval(told, seed=seed), about
            )
    return figures


def measure_captions(images: Tensor, texts: Tensor, stamp: Stamp, seed: int = 0) -> Measurements:
    """CLIP score and caption retrieval of image embeddings [N, D] and their captions' [N, D]."""
    score, found = clip_score(images, texts, seed), retrieval(images, texts, seed=seed)
    figures = {"clip_score": Measurement(score.score, score.interval, stamp)}
    for k, recall in found.recall.items():
        figures[f"caption_recall_at_{k}"] = Measurement(recall, found.intervals[k], stamp)
    return figures


def measure_reconstruction(values: Mapping[str, Tensor], stamp: Stamp, seed: int = 0) -> Measurements:
    """The means of what `likeness` measures of each picture, PSNR (dB) and SSIM among them."""
    figures: Measurements = {}
    for name, each in values.items():
        equal = int((each >= HIGHEST_PSNR).sum()) if name == "psnr" else 0
        note = f"{equal:,} of {len(each):,} pictures count as equal to their originals, with {HIGHEST_PSNR:g} dB"
        interval = mean_interval(each, seed=seed)
        figures[name] = Measurement(float(each.mean()), interval, stamp, note if equal else "")
    return figures
