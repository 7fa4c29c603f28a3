"""Has the model memorised the data, and does it still vary within a class?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, around, mean_interval, weights
from carrara.evaluation.moments import Rows, as_rows
from carrara.evaluation.neighbours import nearest

CHUNK = 1 << 14


@dataclass(frozen=True)
class Memorisation:
    """How close samples lie to the training images, and how close unseen real images lie.

    Attributes:
        fraction: fraction of the samples that are closer to their nearest training image than that image is to its
            own nearest training neighbour. Copies give 1; a model that draws from the data's own distribution
            gives about `held_out_fraction`.
        held_out_fraction: the same fraction for held-out real images: what "not memorised" looks like.
        ratios: float64 [N], distance of a sample to its nearest training image over that image's distance to
            its own nearest training neighbour (below 1 is counted in `fraction`).
        held_out_ratios: float64 [M], the same for the held-out images.
        nearest: int64 [N], the index of each sample's nearest training image.
        held_out_nearest: int64 [M].
        interval, held_out_interval: bootstrap intervals of the two fractions.
    """

    fraction: float
    held_out_fraction: float
    ratios: Tensor
    held_out_ratios: Tensor
    nearest: Tensor
    held_out_nearest: Tensor
    interval: Interval
    held_out_interval: Interval


def memorisation(samples: Rows, train: Rows, held_out: Rows, seed: int = 0) -> Memorisation:
    """Compares samples [N, ...] and held-out images [M, ...] with the training images [K, ...].

    Distances are Euclidean, of pixels or of features, whichever is given.

    Raises:
        UserError: other sizes of image, fewer than 2 training images, NaN.
    """
    sets = [
        as_rows(samples, "samples"),
        as_rows(train, "training images"),
        as_rows(held_out, "held-out images"),
    ]
    if len({rows.shape[1] for rows in sets}) > 1:
        raise UserError(
            f"samples, training and held-out images have {[rows.shape[1] for rows in sets]} values each: "
            "bring them to one resolution and number of channels.",
            key="resolution",
            code="shape",
        )
    if len(sets[1]) < 2:
        raise UserError(
            "memorisation needs at least 2 training images: give the whole training set.", key="train", code="missing"
        )
    _, own = nearest(sets[1], sets[1], same=True)

    def compare(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, distance = nearest(rows, sets[1])
        closer = distance < own[index]
        # 0/0, a copy of an image that the training set holds twice, means nothing: ratio 1, not counted.
        ratio = torch.where(own[index] > 0, distance / own[index], torch.where(distance > 0, torch.inf, 1.0))
        return index, ratio, closer.double()

    index, ratio, closer = compare(sets[0])
    index_out, ratio_out, closer_out = compare(sets[2])
    return Memorisation(
        fraction=float(closer.mean()),
        held_out_fraction=float(closer_out.mean()),
        ratios=ratio,
        held_out_ratios=ratio_out,
        nearest=index,
        held_out_nearest=index_out,
        interval=mean_interval(closer, seed=seed),
        held_out_interval=mean_interval(closer_out, seed=seed),
    )


def class_std(images: Rows, labels: Tensor) -> float:
    """The within-class pixel standard deviation: over the images of a class (ddof 0) for each pixel, then the
    mean over pixels and classes. In the units of the images ([-1, 1] spans 2).

    Args:
        images: [N, C, H, W]; a collapse to one picture per class gives 0.
        labels: int64 [N]; every class that occurs counts the same.
    """
    rows, members = _by_class(images, labels)
    return float(torch.stack([rows[member].std(0, correction=0).mean() for member in members]).mean())


def class_std_interval(
    images: Rows, labels: Tensor, replicates: int = 200, level: float = 0.95, seed: int = 0
) -> Interval:
    """A bootstrap interval of `class_std`, resampled within each class.

    Resampled classes have fewer distinct images and so vary less: only the standard deviation of the replicates is
    used, around the value itself.
    """
    rows, members = _by_class(images, labels)
    total = torch.zeros(replicates, dtype=torch.float64)
    for number, member in enumerate(members):
        own = rows[member] - rows[member].mean(0)
        w = weights(len(own), replicates, seed + number).to(own) / len(own)
        for values in own.split(CHUNK, dim=1):  # [replicates, CHUNK] at once: large images have many pixels
            variance = w @ values.square() - (w @ values).square()
            total += variance.clamp_min(0).sqrt().sum(1).cpu() / own.shape[1]
    return around(class_std(images, labels), total / len(members), level)


def _by_class(images: Rows, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    rows = as_rows(images, "images")
    labels = torch.as_tensor(labels).to(rows.device)
    if labels.shape != rows.shape[:1]:
        raise UserError(
            f"{len(rows)} images came with labels of shape {list(labels.shape)}: give one for each.",
            key="labels",
            code="shape",
        )
    return rows, [(labels == label).nonzero().flatten() for label in labels.unique()]
