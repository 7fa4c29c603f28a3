"""CLIP score and retrieval: by hand, and torchmetrics' arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.evaluation import clip_score, retrieval
from tests.errors import refused


def embeddings(n: int, d: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_cosines_below_zero_count_as_zero() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    result = clip_score(images, texts)
    assert result.per_sample.tolist() == pytest.approx([100, 0, 100 / 2**0.5])
    assert result.score == pytest.approx(float(result.per_sample.mean()))
    assert result.interval.low <= result.score <= result.interval.high


def test_retrieval_counts_better_captions() -> None:
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 2, 1, 3]]
    result = retrieval(images, texts + 0.01 * torch.arange(4)[:, None], ranks=(1, 4))
    assert result.recall == {1: 0.5, 4: 1.0}


def test_chance_level_and_perfect_pairs() -> None:
    x = embeddings(400)
    assert retrieval(x, x).recall[1] == 1
    chance = retrieval(x, embeddings(400, seed=1), ranks=(40,)).recall[40]
    assert chance == pytest.approx(0.1, abs=0.045)  # 3 standard errors of 400 draws


def test_equal_captions_are_one_caption() -> None:
    """Two pictures of 'a cat' are both right with either wording of it."""
    texts = embeddings(3)[[0, 0, 1, 2]]
    assert retrieval(texts, texts).recall[1] == 1


def test_unpaired_embeddings_are_told() -> None:
    with refused("shape", "captions"):
        clip_score(embeddings(3), embeddings(4))
