"""`DiffusionModel.sample` of low-resolution images, against closed forms: their noise is what the network is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.conditioning import LowRes, NoiseAugmentation, TrainingInputs, shrink
from carrara.model import DiffusionModel
from carrara.objectives import DiffusionObjective, Examples
from carrara.process import Noise, schedules
from tests.errors import refused

SCHEDULE = schedules.cosine(1000)
AUGMENTATION = NoiseAugmentation.up_to(0.5)
FACTOR, VARIANCE = 2, 0.04


class Exact(nn.Module):
    """E[x_0|x_t, small] of independent pixels N(0, v), given the low-resolution image with noise and its level.

    A pixel is the mean m of its block, N(0, v/f²), plus what is left of it; the two are independent. The rest is known
    from x_t alone, m from x_t's mean and from the small image α m + σ ε.
    """

    def __init__(self) -> None:
        super().__init__()
        self.params = SimpleNamespace(concat_channels=1, upsample_concat=True)
        self.nothing = nn.Parameter(torch.zeros(()))
        self.conditions: list[Condition] = []

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.conditions.append(condition)
        assert condition.concat is not None
        assert condition.vector is not None
        t = time.double()[:, None, None, None] + 1  # a discrete schedule's network counts from 0
        a, s = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        level = condition.vector.double()[:, :, None, None] * AUGMENTATION.schedule.final_time
        alpha, sigma = AUGMENTATION.schedule.alpha(level), AUGMENTATION.schedule.sigma(level).clamp(min=1e-4)
        shrunk = F.avg_pool2d(x.double(), FACTOR)
        precision = FACTOR**2 / VARIANCE + (alpha / sigma) ** 2 + (FACTOR * a / s) ** 2
        m = (alpha / sigma**2 * condition.concat + a * (FACTOR / s) ** 2 * shrunk) / precision
        rest = x - F.interpolate(shrunk, x.shape[2:], mode="nearest")
        rest = a * VARIANCE / (a**2 * VARIANCE + s**2) * rest
        return (F.interpolate(m, x.shape[2:], mode="nearest") + rest).to(x)


LOW_RES = LowRes((1, 8, 8), FACTOR, AUGMENTATION)


def exact(low_res: LowRes = LOW_RES) -> DiffusionModel:
    return DiffusionModel(Exact(), SCHEDULE, (1, 8, 8), "x0", (low_res,))


def shrunk(images: Tensor) -> Tensor:
    return shrink(images, FACTOR)


def test_shrunk_again_a_sample_is_the_small_image() -> None:
    small = Noise(1).normal((64, 1, 4, 4)) * VARIANCE**0.5 / FACTOR
    made = exact().sample(low_res=small, steps=100)
    # the small image's noise is set to 1e-4 of the oracle where there is none
    torch.testing.assert_close(shrunk(made.images), small, atol=1e-3, rtol=0)
    rest = made.images - F.interpolate(small, (8, 8), mode="nearest")
    # (f² - 1)/f² of the variance is left within a block, of 64 × 64 pixels: 5 standard errors of 2.6 %
    assert float(rest.var()) == pytest.approx(VARIANCE * (1 - FACTOR**-2), rel=0.13)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_with_noise_a_sample_keeps_to_the_small_image_as_far_as_that_goes(fraction: float) -> None:
    """m given α m_0 + σ ε is N(κ (α m_0 + σ ε), V), V = 1/(f²/v + α²/σ²), κ = V α/σ². A network that is given another
    level than the image has trusts it too much or too little, which these moments show."""
    truth, count = 0.12, 600
    made = exact().sample(low_res=torch.full((count, 1, 4, 4), truth), steps=100, noise_level=fraction)
    level = AUGMENTATION.level(fraction)
    alpha, sigma = float(AUGMENTATION.schedule.alpha(level)), float(AUGMENTATION.schedule.sigma(level))
    variance = 1 / (FACTOR**2 / VARIANCE + (alpha / sigma) ** 2)
    trust = variance * alpha / sigma**2
    spread = variance + (trust * sigma) ** 2
    means = shrunk(made.images).double().flatten()
    deviation = (spread / means.numel()) ** 0.5
    assert float(means.mean()) == pytest.approx(trust * alpha * truth, abs=5 * deviation)
    # the relative error of a variance of n draws is sqrt(2/n), 1.4 %: 5 of it, and what 100 steps leave
    assert float(means.var()) == pytest.approx(spread, rel=0.08)


def test_training_and_sampling_give_a_level_alike() -> None:
    """The level that a training step drew, requested in sampling: the same number and the same noise."""
    network = Exact()
    model = DiffusionModel(network, SCHEDULE, (1, 8, 8), "x0", (LOW_RES,))
    images = Noise(1).uniform((5, 1, 8, 8)).float() * 2 - 1
    draw = Noise(3).rows(range(5))
    pairs = Examples(images, LOW_RES.examples(TrainingInputs(images), draw))
    DiffusionObjective(network, SCHEDULE, "x0", conditioners=(LOW_RES,)).terms(pairs, draw, "network")
    trained = network.conditions[-1]
    assert trained.vector is not None
    assert trained.concat is not None
    for row, fraction in enumerate(trained.vector[:, 0].tolist()):
        model.sample(low_res=shrunk(images)[row : row + 1], steps=1, noise_level=fraction, seed=3, first=row)
        condition = network.conditions[-1]
        assert condition.vector is not None
        assert condition.concat is not None
        torch.testing.assert_close(condition.vector[0], trained.vector[row], atol=1e-7, rtol=0)  # float32's last digit
        torch.testing.assert_close(condition.concat[0], trained.concat[row], atol=1e-5, rtol=0)


def test_levels_below_the_first_are_none() -> None:
    assert float(AUGMENTATION.level(0.0005)) == 0
    assert float(AUGMENTATION.level(0.5)) == AUGMENTATION.highest


def test_what_it_was_trained_for_is_saved(upsampler_run: Path, tmp_path: Path) -> None:
    model = DiffusionModel.load(upsampler_run)
    model.save(tmp_path)
    assert DiffusionModel.load(tmp_path).config() == model.config()


@pytest.mark.parametrize(
    ("low_res", "level", "code", "key"),
    [
        (torch.zeros(2, 1, 8, 8), 0.0, "shape", "low_res"),
        (torch.zeros(2, 3, 4, 4), 0.0, "shape", "low_res"),
        (torch.zeros(4, 4), 0.0, "shape", "low_res"),
        (torch.full((2, 1, 4, 4), 200.0), 0.0, "invalid", "low_res"),
        (torch.full((2, 1, 4, 4), float("nan")), 0.0, "invalid", "low_res"),
        (torch.zeros(2, 1, 4, 4), 0.6, "invalid", "noise_level"),
        (torch.zeros(2, 1, 4, 4), -0.1, "invalid", "noise_level"),
        (None, 0.0, "missing", "low_res"),
    ],
)
def test_what_an_up_sampler_cannot_enlarge_is_refused(
    low_res: Tensor | None, level: float, code: Any, key: str
) -> None:
    with refused(code, key):
        exact().sample(low_res=low_res, noise_level=level)


def test_an_up_sampler_of_other_programs_takes_no_noise(tiny_run: Path) -> None:
    model = exact(LowRes((1, 8, 8)))
    with refused("unsupported", "noise_level"):
        model.sample(low_res=torch.zeros(1, 1, 4, 4), noise_level=0.1)
    with refused("shape", "low_res"):
        model.sample(low_res=torch.zeros(1, 1, 3, 4))
    inputs: dict[str, Any] = {"low_res": torch.zeros(1, 1, 4, 4), "noise_level": 0.1}
    for name, value in inputs.items():
        with refused("unsupported", name):
            DiffusionModel.load(tiny_run).sample([3], **{name: value})
