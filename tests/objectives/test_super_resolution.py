"""Super-resolution: what the network is shown of the small image and told of its noise; that pairs train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.networks import UNet, UNetParams
from carrara.objectives import Examples, NoiseAugmentation, SuperResolutionObjective, pairs
from carrara.process import NetworkDenoiser, Noise, grids, schedules
from carrara.solvers import DDIM, solve
from tests.objectives.test_diffusion import Told

SCHEDULE = schedules.linear(50)
VECTOR = NoiseAugmentation(SCHEDULE, 20.0)
LABEL = NoiseAugmentation(SCHEDULE, 20.0, told="label")


def batch(n: int = 6) -> Examples:
    return pairs(Noise(1).uniform((n, 1, 4, 4)).float() * 2 - 1, 2)


@pytest.mark.parametrize("augmentation", [VECTOR, LABEL], ids=["vector", "label"])
def test_the_network_sees_the_noised_small_image_and_is_told_its_level(augmentation: NoiseAugmentation) -> None:
    network = Told()
    objective = SuperResolutionObjective(network, SCHEDULE, augmentation)
    examples, draw = batch(64), Noise(3).at(7)
    terms = objective.terms(examples, draw, "network")
    assert terms.per_sample.shape == (64,)
    told = network.condition
    if augmentation.told == "label":
        assert told.vector is None
        assert told.label is not None
        times = told.label.double() + 1
        assert 1 <= times.min() < 4
        assert 17 < times.max() <= 20
    else:
        assert told.label is None
        assert told.vector is not None
        assert told.vector.shape == (64, 1)
        times = told.vector[:, 0].double() * 50
        assert times.min() == 0  # a share of the small images stays as it is
        assert 18 < times.max() <= 20
    small, eps = examples.condition.concat, draw.normal((64, 1, 2, 2), sub=4)
    assert small is not None
    alpha = SCHEDULE.alpha(times).reshape(-1, 1, 1, 1)
    sigma = SCHEDULE.sigma(times).reshape(-1, 1, 1, 1)
    expected = alpha * small + sigma * eps
    # The level is told in float32, from which the times here come.
    torch.testing.assert_close(told.concat, expected.float(), rtol=0, atol=1e-5)


def test_a_samples_noise_depends_on_its_position_alone() -> None:
    whole, network = batch(8), Told()
    objective = SuperResolutionObjective(network, SCHEDULE, VECTOR)
    objective.terms(whole, Noise(3).rows(range(8)), "network")
    together = network.condition
    assert whole.condition.concat is not None
    assert together.concat is not None
    half = Examples(whole.x0[4:], Condition(concat=whole.condition.concat[4:]))
    objective.terms(half, Noise(3).rows(range(4, 8)), "network")
    assert network.condition.concat is not None
    assert torch.equal(network.condition.concat, together.concat[4:])


def test_a_level_of_zero_is_the_small_image_itself() -> None:
    small = batch().condition.concat
    assert small is not None
    told = VECTOR.condition(small, 0.0, Noise(0))
    assert told.concat is not None
    assert told.vector is not None
    assert torch.equal(told.concat, small)
    assert not told.vector.any()
    none = NoiseAugmentation(SCHEDULE, 0.0)
    assert not none.levels(torch.rand(100, dtype=torch.float64)).any()


def test_dropping_a_label_keeps_the_small_image_and_its_level() -> None:
    network, examples = Told(), batch(64)
    labelled = Examples(examples.x0, replace(examples.condition, label=torch.arange(64) % 3))
    null = Condition(label=torch.tensor([3]))
    objective = SuperResolutionObjective(network, SCHEDULE, VECTOR, null=null, dropout=0.5)
    objective.terms(labelled, Noise(3), "network")
    dropped = network.condition
    assert dropped.label is not None
    share = float((dropped.label == 3).double().mean())
    assert 0.3 < share < 0.7  # 64 throws of a coin: 4 standard deviations are 0.25
    plain = SuperResolutionObjective(network, SCHEDULE, VECTOR)
    plain.terms(labelled, Noise(3), "network")
    for slot in ("concat", "vector"):
        assert torch.equal(getattr(dropped, slot), getattr(network.condition, slot))


def test_small_images_are_means_and_sizes_must_divide() -> None:
    images = torch.randn(2, 3, 6, 9)
    made = pairs(images, 3, Condition(label=torch.tensor([1, 2])))
    assert made.condition.concat is not None
    torch.testing.assert_close(made.condition.concat[:, :, 1, 2], images[:, :, 3:6, 6:9].mean((2, 3)))
    assert made.condition.label is not None
    with pytest.raises(UserError, match=r"images of 6×9 cannot be shrunk 4 times: 4×8 can"):
        pairs(images, 4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"highest": 51.0}, r"lies in 0\.\.50, 51 does not"),
        ({"highest": 0.0, "told": "label"}, r"lies in 1\.\.50"),
        ({"highest": 5.0, "told": "labels"}, "did you mean 'label'"),
        ({"highest": 0.5, "told": "label", "schedule": schedules.rectified_flow()}, r"lies in 1\.\.1"),
        ({"highest": 1.0, "told": "label", "schedule": schedules.rectified_flow()}, "discrete schedule only"),
    ],
)
def test_impossible_augmentations_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        NoiseAugmentation(**{"schedule": SCHEDULE, **settings})


def test_what_does_not_fit_is_refused() -> None:
    small = batch().condition.concat
    assert small is not None
    with pytest.raises(UserError, match="learns from pairs"):
        SuperResolutionObjective(Told(), SCHEDULE, VECTOR).terms(Examples(batch().x0), Noise(0), "network")
    with pytest.raises(UserError, match="condition's vector is filled"):
        VECTOR.condition(small, 3.0, Noise(0), Condition(vector=torch.zeros(1, 1)))
    for level in (0.0, 2.5):
        with pytest.raises(UserError, match="a whole time from 1 on"):
            LABEL.condition(small, level, Noise(0))


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
    network = UNet(params)
    objective = SuperResolutionObjective(network, schedule, NoiseAugmentation(schedule, 10.0), predicts="x0")
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(70):
        draw = Noise(0).rows(range(32 * step, 32 * (step + 1)))
        loss = objective.terms(pairs(stripes(32, step), 2), draw, "network").per_sample.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    held_out = stripes(16, 10_001)
    small = pairs(held_out, 2).condition.concat
    assert small is not None
    told = objective.augmentation.condition(small, 2.0, Noise(9))
    grid = grids.trailing(schedule, 5)
    with torch.no_grad():
        denoiser = NetworkDenoiser(network.eval(), schedule, "x0")
        made = solve(denoiser, schedule, DDIM(), grid, Noise(5).normal((16, 1, 8, 8)), condition=told)
    blurred = F.interpolate(small, (8, 8), mode="bilinear")
    assert psnr(made, held_out) > psnr(blurred, held_out) + 6  # half of the error's amplitude
