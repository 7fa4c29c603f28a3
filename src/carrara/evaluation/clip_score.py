"""Do the pictures show what their captions say? CLIP score and caption retrieval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, mean_interval
from carrara.evaluation.moments import as_rows


@dataclass(frozen=True)
class ClipScore:
    """Agreement of pictures with their captions.

    Attributes:
        score: mean of 100·max(cos, 0) over the pairs (Hessel et al. 2021, with torchmetrics' 100).
        per_sample: float64 [N].
        interval: bootstrap interval of the mean.
    """

    score: float
    per_sample: Tensor
    interval: Interval


@dataclass(frozen=True)
class Retrieval:
    """How often a picture's own caption is among the k nearest of all captions.

    Equal captions count as one: a picture is right with any caption of its own wording.
    """

    recall: dict[int, float]
    intervals: dict[int, Interval]


def clip_score(images: Tensor, texts: Tensor, seed: int = 0) -> ClipScore:
    """The CLIP score of image embeddings [N, D] and the embeddings [N, D] of their captions, pair by pair."""
    x, y = _pairs(images, texts)
    per_sample = 100 * (x * y).sum(1).clamp_min(0)
    return ClipScore(float(per_sample.mean()), per_sample, mean_interval(per_sample, seed=seed))


def retrieval(images: Tensor, texts: Tensor, ranks: tuple[int, ...] = (1, 5, 10), seed: int = 0) -> Retrieval:
    """Recall at each of `ranks`, image to caption, for embeddings [N, D] of pairs."""
    x, y = _pairs(images, texts)
    wordings, own = torch.unique(y, dim=0, return_inverse=True)
    similarity = x @ wordings.T
    better = (similarity > similarity.gather(1, own[:, None])).sum(1)
    found = {k: (better < k).double() for k in ranks}
    return Retrieval(
        {k: float(hits.mean()) for k, hits in found.items()},
        {k: mean_interval(hits, seed=seed) for k, hits in found.items()},
    )


def _pairs(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 unit vectors."""
    x, y = as_rows(images, "image embeddings"), as_rows(texts, "caption embeddings")
    if x.shape != y.shape:
        raise UserError(
            f"{list(x.shape)} image embeddings and {list(y.shape)} caption embeddings are no pairs: "
            "give one caption for each image, both from one CLIP model.",
            key="captions",
            code="shape",
        )
    return x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
