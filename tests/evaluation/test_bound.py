"""Bits per dimension: against a discrete source of known entropy, on models, in batches; refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.evaluation import bits_per_dimension
from carrara.model import DiffusionModel
from carrara.process import GaussianMixture, Noise, Prediction, grids, schedules
from carrara.process.schedules import Schedule, Time
from tests.errors import refused

LEVELS = 17
SHARES = torch.arange(1, LEVELS + 1, dtype=torch.float64) / 153
SOURCE = GaussianMixture(
    SHARES, torch.linspace(-1, 1, LEVELS, dtype=torch.float64).unsqueeze(1), torch.zeros(LEVELS, dtype=torch.float64)
)
ENTROPY = float(-(SHARES * SHARES.log2()).sum())


class Rounding(nn.Module):
    """A model whose network tells x_0 as the noisy image itself, and its reverse variance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Dropout(0.5)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def model(schedule: Schedule | None = None) -> DiffusionModel:
    return DiffusionModel(Rounding(), schedule or schedules.linear(30), (1, 4, 4), "x0", levels=LEVELS)


def digits(n: int = 6) -> Tensor:
    return ((Noise(1).uniform((n, 1, 4, 4)) * 16).round() / 8 - 1).float()


@pytest.mark.parametrize("steps", [25, 300])
def test_the_entropy_of_a_discrete_source_is_never_beaten_and_nearly_reached(steps: int) -> None:
    schedule, n = schedules.cosine(steps), 5000
    x = SOURCE.sample(n, Noise(2))
    bound = bits_per_dimension(
        SOURCE.denoiser(schedule),
        x,
        levels=LEVELS,
        variance="optimal",
        clip=False,
        noise=Noise(3),
        batch_size=n,
    )
    assert bound.unit == "bits/dim"
    code = -torch.log2(SHARES[((x + 1) * 8).round().long().flatten()])
    gap = bound.total - code
    mean, error = float(gap.mean()), float(gap.std()) / math.sqrt(n)
    # Of 3.85 bits. Where one bin or its neighbour is in question, no Gaussian step is exact: a tenth is left.
    assert -4 * error < mean < 0.1 + 4 * error
    assert float(code.mean()) == pytest.approx(ENTROPY, abs=6 * float(code.std()) / math.sqrt(n))


def test_the_wrong_number_of_levels_is_noticed() -> None:
    # Sixteenths of the digits scan are no 8-bit values: reading them as such would give other bits.
    with refused("mismatch", "levels"):
        bits_per_dimension(model(), digits(), levels=256)
    with refused("mismatch", "levels"):
        bits_per_dimension(model(), digits() + 0.01)
    with refused("mismatch", "levels"):
        bits_per_dimension(model(), 2 * digits())


class TestModel:
    def test_takes_its_schedule_its_levels_and_switches_dropout_off(self) -> None:
        pictures, own = digits(), model()
        own.network.train()
        first, second = (bits_per_dimension(own, pictures) for _ in range(2))
        assert torch.equal(first.total, second.total)
        assert own.network.training
        named = bits_per_dimension(own.denoiser(), pictures, levels=LEVELS)
        own.network.eval()
        assert not torch.equal(named.total, first.total)  # a bare denoiser is taken as it is
        torch.testing.assert_close(bits_per_dimension(own.denoiser(), pictures, levels=LEVELS).total, first.total)

    def test_does_not_depend_on_the_batch(self) -> None:
        pictures = digits()
        whole = bits_per_dimension(model(), pictures)
        for size in (1, 4):
            parts = bits_per_dimension(model(), pictures, batch_size=size)
            torch.testing.assert_close(parts.terms, whole.terms)
            torch.testing.assert_close(parts.prior, whole.prior)
        alone = bits_per_dimension(model(), pictures[3:4], noise=Noise(0).rows([3]))
        torch.testing.assert_close(alone.terms, whole.terms[3:4])

    def test_errors_and_clipping(self) -> None:
        class Far:
            schedule = schedules.linear(30)

            def __call__(self, x: Tensor, t: Time, condition: Condition) -> Prediction:
                alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
                return Prediction.from_x0(x, torch.full_like(x, 5.0), alpha, sigma)

        pictures = digits()
        clipped = bits_per_dimension(Far(), pictures, levels=LEVELS)
        torch.testing.assert_close(
            clipped.x0_errors, (pictures - 1).square().mean((1, 2, 3)).unsqueeze(1).expand(-1, 30)
        )
        free = bits_per_dimension(Far(), pictures, levels=LEVELS, clip=False)
        torch.testing.assert_close(free.x0_errors[:, 0], (pictures - 5).square().mean((1, 2, 3)))
        # ε̂ is derived again: the two errors are in the ratio of SNR.
        snr = Far.schedule.log_snr(free.times).exp().float()
        torch.testing.assert_close(free.eps_errors, free.x0_errors * snr, rtol=1e-3, atol=1e-5)

    def test_shorter_grids_are_chains_of_their_own(self) -> None:
        schedule = schedules.linear(200)
        grid = grids.sections(schedule, "3,4,5")
        bound = bits_per_dimension(model(schedule), digits(), grid)
        assert bound.terms.shape == (6, 12)
        assert torch.equal(bound.times, grid.times[:-1])
        torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(1))

    def test_conditions_follow_their_images(self) -> None:
        labels = torch.tensor([0, 1, 2, 0, 1, 2])
        mixture = GaussianMixture([1, 1, 1], Noise(4).normal((3, 1, 4, 4)), [0.1] * 3)
        denoiser = mixture.denoiser(schedules.linear(30))
        whole = bits_per_dimension(denoiser, digits(), levels=LEVELS, condition=Condition(label=labels), batch_size=4)
        alone = bits_per_dimension(
            denoiser, digits()[5:], levels=LEVELS, condition=Condition(label=labels[5:]), noise=Noise().rows([5])
        )
        torch.testing.assert_close(alone.total, whole.total[5:], rtol=1e-4, atol=1e-4)

    def test_progress_and_summary(self) -> None:
        seen: list[tuple[int, int]] = []
        bound = bits_per_dimension(
            model(), digits(), batch_size=4, on_step=lambda done, total: seen.append((done, total))
        )
        assert seen == [(i + 1, 60) for i in range(60)]
        summary = json.loads(json.dumps(bound.summary()))
        assert summary["unit"] == "bits/dim"
        assert summary["total"] == pytest.approx(summary["prior"] + summary["matching"] + summary["reconstruction"])
        assert len(summary["terms"]) == len(summary["times"]) == summary["steps"] == 30
        assert bits_per_dimension(model(), digits(1)).summary()["standard_error"] is None


class TestRefusals:
    def test_latent_models_have_no_bits_of_pixels(self) -> None:
        own = model()
        latent = replace(own, codec=replace(own.codec, bounded=False))  # type: ignore[type-var]
        with refused("unsupported", "model"):
            bits_per_dimension(latent, digits())

    def test_continuous_schedules_need_a_grid(self) -> None:
        with refused("missing", "grid"):
            bits_per_dimension(model(schedules.edm()), digits())

    def test_denoisers_without_a_schedule(self) -> None:
        with refused("missing", "schedule"):
            bits_per_dimension(lambda x, t, c: model().denoiser()(x, t, c), digits(), levels=LEVELS)

    def test_grids_that_do_not_end_clean(self) -> None:
        grid = grids.trailing(schedules.linear(30), 5, terminal="last")
        with pytest.raises(UserError, match="descends to the clean point"):
            bits_per_dimension(model(), digits(), grid)
