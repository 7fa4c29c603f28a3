"""Memorisation and diversity: copies, jittered copies and fresh draws are told apart; on real digits too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.evaluation import class_std, class_std_interval, memorisation
from tests.errors import refused


def draw(n: int, seed: int) -> Tensor:
    return torch.randn(n, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 scanned digits of scikit-learn, [1437, 64] for training and [360, 64] held out, in [-1, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(pixels / 8 - 1, test_size=360, random_state=0, stratify=labels)
    return torch.tensor(train), torch.tensor(held_out)


def test_nearest_neighbours_by_hand() -> None:
    train = torch.tensor([[0.0], [1.0], [10.0]])
    result = memorisation(torch.tensor([[0.2], [8.0], [10.0]]), train, torch.tensor([[4.0]]))
    assert result.nearest.tolist() == [0, 2, 2]
    # Their own nearest neighbours are 1, 1 and 9 away; the samples 0.2, 2 and 0.
    torch.testing.assert_close(result.ratios, torch.tensor([0.2, 2 / 9, 0.0], dtype=torch.float64))
    assert result.fraction == 1
    assert result.held_out_nearest.tolist() == [1]
    assert result.held_out_ratios.tolist() == [3]
    assert result.held_out_fraction == 0


def test_fresh_draws_look_like_held_out_ones() -> None:
    result = memorisation(draw(800, 0), draw(800, 1), draw(800, 2))
    # Two shares of 800 each: 3 standard errors of their difference are 3·√(2·0.25/800) = 0.075.
    assert result.fraction == pytest.approx(result.held_out_fraction, abs=0.075)
    assert result.interval.low < result.fraction < result.interval.high


def test_held_out_digits_and_jittered_copies(digits: tuple[Tensor, Tensor]) -> None:
    train, held_out = digits
    jitter = 0.02 * torch.randn(train.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = memorisation(train + jitter, train, held_out)
    assert result.held_out_fraction == pytest.approx(0.42, abs=0.005)  # known of this split
    assert result.fraction == 1
    assert result.nearest.tolist() == list(range(len(train)))


def test_exact_copies_are_at_distance_zero_even_far_from_the_origin() -> None:
    train = draw(50, 0) + 1000
    result = memorisation(train, train, draw(50, 1) + 1000)
    assert result.ratios.abs().max() == 0
    assert result.fraction == 1


def test_a_doubled_training_image_is_not_evidence() -> None:
    train = torch.tensor([[0.0], [0.0], [5.0]])
    result = memorisation(torch.tensor([[0.0], [1.0]]), train, torch.tensor([[5.0]]))
    assert result.ratios.tolist() == [1, torch.inf]
    assert result.fraction == 0


def test_spread_is_the_mean_deviation_within_classes() -> None:
    images = torch.tensor([0.0, 2.0, 5.0, 5.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert class_std(images, torch.tensor([3, 3, 7, 7])) == pytest.approx(0.5)  # (1 + 0) / 2
    assert class_std(images, torch.tensor([0, 1, 2, 3])) == 0


def test_spread_falls_with_collapse_and_its_interval_holds_it() -> None:
    images, labels = draw(400, 0), torch.arange(400) % 4
    value, interval = class_std(images, labels), class_std_interval(images, labels)
    assert value == pytest.approx(1, abs=0.05)
    assert class_std(images * 0.3, labels) == pytest.approx(0.3 * value)
    # Resampling within a class lowers a variance by 1/100: the interval may lie that much too low.
    assert interval.low < value < interval.high + 0.01


def test_mistakes_are_told() -> None:
    with refused("shape", "resolution"):
        memorisation(draw(4, 0), torch.zeros(4, 1, 2, 2), draw(4, 1))
    with refused("not_finite", "held-out images"):
        memorisation(draw(4, 0), draw(4, 1), draw(4, 2) * torch.nan)
    with refused("missing", "train"):
        memorisation(draw(4, 0), draw(1, 1), draw(4, 2))
    with refused("shape", "labels"):
        class_std(draw(4, 0), torch.zeros(3))
