"""The low-resolution image as a condition: what the network gets of it and of its noise; that pairs train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.conditioning import ClassLabels, LowRes, NoiseAugmentation, TrainingInputs, drop, examples, shrink
from carrara.networks import UNet, UNetParams
from carrara.objectives import DiffusionObjective, Examples
from carrara.process import NetworkDenoiser, Noise, grids, schedules
from carrara.solvers import DDIM, solve
from tests.errors import refused

SCHEDULE = schedules.linear(50)
VECTOR = NoiseAugmentation(SCHEDULE, 20.0)
LABEL = NoiseAugmentation(SCHEDULE, 20.0, slot="label")


def low_res(augmentation: NoiseAugmentation = VECTOR) -> LowRes:
    return LowRes((1, 4, 4), 2, augmentation)


def batch(n: int = 6) -> Tensor:
    return Noise(1).uniform((n, 1, 4, 4)).float() * 2 - 1


@pytest.mark.parametrize("augmentation", [VECTOR, LABEL], ids=["vector", "label"])
def test_the_condition_is_the_noisy_image_and_its_level(augmentation: NoiseAugmentation) -> None:
    images, draw = batch(64), Noise(3).at(7)
    condition = low_res(augmentation).examples(TrainingInputs(images), draw)
    assert condition.tensors().keys() == {"concat", augmentation.slot}
    if augmentation.slot == "label":
        assert condition.label is not None
        times = condition.label.double() + 1
        assert 1 <= times.min() < 4
        assert 17 < times.max() <= 20
    else:
        assert condition.vector is not None
        assert condition.vector.shape == (64, 1)
        times = condition.vector[:, 0].double() * 50
        assert times.min() == 0  # some of the images stay as they are
        assert 18 < times.max() <= 20
    eps = draw.normal((64, 1, 2, 2), sub=4)
    alpha = SCHEDULE.alpha(times).reshape(-1, 1, 1, 1)
    sigma = SCHEDULE.sigma(times).reshape(-1, 1, 1, 1)
    expected = alpha * shrink(images, 2) + sigma * eps
    # The level is given in float32, from which the times here come.
    torch.testing.assert_close(condition.concat, expected.float(), rtol=0, atol=1e-5)


def test_the_noise_of_a_sample_depends_on_its_position_alone() -> None:
    images = batch(8)
    whole = low_res().examples(TrainingInputs(images), Noise(3).rows(range(8)))
    half = low_res().examples(TrainingInputs(images[4:]), Noise(3).rows(range(4, 8)))
    assert whole.concat is not None
    assert half.concat is not None
    assert torch.equal(half.concat, whole.concat[4:])


def test_a_level_of_zero_is_the_image_itself() -> None:
    small = shrink(batch(), 2)
    condition = VECTOR.condition(small, 0.0, Noise(0))
    assert condition.concat is not None
    assert condition.vector is not None
    assert torch.equal(condition.concat, small)
    assert not condition.vector.any()
    none = NoiseAugmentation(SCHEDULE, 0.0)
    assert not none.levels(torch.rand(100, dtype=torch.float64)).any()


def test_dropping_a_label_keeps_the_image_and_its_level() -> None:
    conditioners = (ClassLabels(("a", "b", "c"), dropout=0.5), low_res())
    inputs = TrainingInputs(batch(64), torch.arange(64) % 3)
    condition = examples(conditioners, inputs, Noise(3))
    dropped = drop(conditioners, condition, Noise(3), 64)
    assert dropped.label is not None
    assert 0.3 < float((dropped.label == 3).double().mean()) < 0.7  # 64 throws: 4 standard deviations are 0.25
    for slot in ("concat", "vector"):
        assert torch.equal(getattr(dropped, slot), getattr(condition, slot))


def test_pixels_are_means_and_sizes_must_divide() -> None:
    images = torch.randn(2, 3, 6, 9)
    torch.testing.assert_close(shrink(images, 3)[:, :, 1, 2], images[:, :, 3:6, 6:9].mean((2, 3)))
    with refused("shape", "upsampling.factor"):
        shrink(images, 4)


@pytest.mark.parametrize(
    ("settings", "code", "key"),
    [
        ({"highest": 51.0}, "invalid", "highest"),
        ({"highest": 0.0, "slot": "label"}, "invalid", "highest"),
        ({"highest": 5.0, "slot": "labels"}, "unknown", "slot"),
        ({"highest": 0.5, "slot": "label", "schedule": schedules.rectified_flow()}, "invalid", "highest"),
        ({"highest": 1.0, "slot": "label", "schedule": schedules.rectified_flow()}, "conflict", "slot"),
    ],
)
def test_impossible_augmentations_are_refused(settings: dict[str, Any], code: Any, key: str) -> None:
    with refused(code, key):
        NoiseAugmentation(**{"schedule": SCHEDULE, **settings})


def test_cached_latents_have_no_pixels_to_shrink() -> None:
    with refused("conflict", "upsampling"):
        low_res().examples(TrainingInputs(), Noise(0))


def test_two_conditioners_of_one_slot_are_refused() -> None:
    both = (ClassLabels(("a",)), low_res(LABEL))
    with refused("conflict", "label"):
        examples(both, TrainingInputs(batch(), torch.zeros(6, dtype=torch.int64)), Noise(0))


@pytest.mark.parametrize("level", [0.0, 2.5])
def test_a_level_that_is_no_label_is_refused(level: float) -> None:
    with refused("invalid", "noise_level"):
        LABEL.condition(shrink(batch(), 2), level, Noise(0))


def psnr(x: Tensor, y: Tensor) -> float:
    return float((10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))).mean())


def test_pairs_train_a_network_that_beats_up_sampling() -> None:
    """Images of few stripes, of half the size: what a bilinear map blurs, a network that has seen stripes knows."""
    torch.manual_seed(0)
    schedule = schedules.cosine(50)

    def stripes(n: int, seed: int) -> Tensor:
        noise = Noise(seed)
        phase = (noise.uniform((n, 1)) * 8).floor()
        wave = ((torch.arange(8) + phase) % 8 < 4).float() * 2 - 1
        return wave[:, None, None, :].expand(n, 1, 8, 8).float().contiguous()

    params = UNetParams(
        image_size=(8, 8),
        in_channels=1,
        channels=16,
        channel_mult=(1,),
        blocks_per_level=1,
        attention=(),
        norm_groups=4,
        concat_channels=1,
        upsample_concat=True,
        vector_channels=1,
    )
    network, condition = UNet(params), LowRes((1, 8, 8), 2, NoiseAugmentation(schedule, 10.0))
    objective = DiffusionObjective(network, schedule, "x0", conditioners=(condition,))
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(70):
        images, draw = stripes(32, step), Noise(0).rows(range(32 * step, 32 * (step + 1)))
        pairs = Examples(images, condition.examples(TrainingInputs(images), draw))
        loss = objective.terms(pairs, draw, "network").per_sample.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    held_out = stripes(16, 10_001)
    small = shrink(held_out, 2)
    given = NoiseAugmentation(schedule, 10.0).condition(small, 2.0, Noise(9))
    grid = grids.trailing(schedule, 5)
    with torch.no_grad():
        denoiser = NetworkDenoiser(network.eval(), schedule, "x0")
        made = solve(denoiser, schedule, DDIM(), grid, Noise(5).normal((16, 1, 8, 8)), condition=given)
    blurred = F.interpolate(small, (8, 8), mode="bilinear")
    assert psnr(made, held_out) > psnr(blurred, held_out) + 6  # half of the error's amplitude
