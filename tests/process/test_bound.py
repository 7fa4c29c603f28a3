"""The chain: which variances its pairs have, what a pair adds to the bound."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from carrara.process import Chain, Grid, Noise, Prediction, Transition, diffuse, grids, schedules
from carrara.process.schedules import level
from tests.errors import refused

SCHEDULE = schedules.linear(1000)
GRID = grids.trailing(SCHEDULE, 10)


def pictures(seed: int = 1, n: int = 4) -> Tensor:
    """8-bit pictures."""
    return (Noise(seed).uniform((n, 1, 2, 3)) * 255).round() / 127.5 - 1


def predicted(index: int, x0: Tensor, error: float = 0.1, **known: Tensor) -> Prediction:
    t = GRID.pairs()[index][0]
    x = diffuse(SCHEDULE, x0, t, Noise(2).like(x0))
    alpha, sigma = level(SCHEDULE, t)
    return Prediction.from_x0(x, x0 + error * Noise(3).like(x0), alpha, sigma, **known)


@pytest.mark.parametrize("index", range(9))
def test_denoising_matching_is_half_the_change_of_snr_times_the_error(index: int) -> None:
    x0 = pictures()
    prediction = predicted(index, x0)
    t, s = GRID.pairs()[index]
    change = float(SCHEDULE.log_snr(s).exp() - SCHEDULE.log_snr(t).exp())
    closed = 0.5 * change * (x0 - prediction.x0).square().flatten(1).mean(1)
    torch.testing.assert_close(Chain(SCHEDULE, GRID, "small").term(prediction, x0, index), closed, rtol=1e-9, atol=0)


@pytest.mark.parametrize("index", range(9))
def test_the_derivation_s_weight_on_eps(index: int) -> None:
    # β²/(2 Σ α (1-ᾱ)) ‖ε - ε̂‖² of Ho et al. (2020), eq. 12, with the pair's own β = σ²_{t|s}.
    x0 = pictures()
    prediction = predicted(index, x0)
    pair = Transition.of(SCHEDULE, *GRID.pairs()[index])
    eps = (prediction.x - pair.alpha_t * x0) / pair.sigma_t
    weight = pair.variance**2 / (2 * pair.posterior_variance * pair.alpha_ts**2 * pair.sigma_t**2)
    closed = weight * (eps - prediction.eps).square().flatten(1).mean(1)
    torch.testing.assert_close(Chain(SCHEDULE, GRID, "small").term(prediction, x0, index), closed, rtol=1e-9, atol=0)


def test_the_variances_of_every_pair() -> None:
    x0 = pictures()
    raw = Noise(4).like(x0)
    pairs = [Transition.of(SCHEDULE, t, s) for t, s in GRID.pairs()]
    for index, pair in enumerate(pairs):
        prediction = predicted(index, x0, variance_fraction=raw, x0_variance=raw**2)
        small, large = pair.posterior_variance, pair.variance
        if index == 9:  # the pair that ends clean: σ²_post of the pair before, also for "large"
            small = pairs[8].posterior_variance
        fraction = (raw + 1) / 2
        expected = {
            "small": math.log(small),
            "large": math.log(small if index == 9 else large),
            "learned": fraction * math.log(large) + (1 - fraction) * math.log(small),
            "optimal": (pair.posterior_variance + pair.x0_coefficient**2 * raw**2).log(),
            None: fraction * math.log(large) + (1 - fraction) * math.log(small),
        }
        for kind, log_variance in expected.items():
            step = Chain(SCHEDULE, GRID, kind).reverse(prediction, index)  # type: ignore[arg-type]
            torch.testing.assert_close(
                torch.as_tensor(step.log_variance, dtype=torch.float64),
                torch.as_tensor(log_variance, dtype=torch.float64),
            )
            torch.testing.assert_close(step.mean, pair.posterior_mean(prediction.x, prediction.x0))
    without = predicted(3, x0)
    assert (
        Chain(SCHEDULE, GRID).reverse(without, 3).log_variance
        == Chain(SCHEDULE, GRID, "small").reverse(without, 3).log_variance
    )


def test_a_grid_of_one_pair_and_continuous_data() -> None:
    x0 = pictures()
    one = Grid(torch.tensor([400.0, 0.0], dtype=torch.float64))
    alpha, sigma = level(SCHEDULE, 400)
    prediction = Prediction.from_x0(diffuse(SCHEDULE, x0, 400, Noise(2).like(x0)), x0 + 0.1, alpha, sigma)
    for kind in ("small", "large"):
        step = Chain(SCHEDULE, one, kind).reverse(prediction, 0)
        assert step.log_variance == pytest.approx(2 * math.log(sigma))
    # Continuous data: the density of N(x̂_0, σ²_{t|0}), on any grid.
    chain = Chain(SCHEDULE, GRID, "small", levels=None)
    last = predicted(9, x0)
    closed = -torch.distributions.Normal(last.x0, level(SCHEDULE, GRID.pairs()[9][0])[1]).log_prob(x0)
    torch.testing.assert_close(chain.term(last, x0, 9), closed.flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["small", "large", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_every_sample_are_those_of_one(kind: str, dtype: torch.dtype) -> None:
    x0 = pictures(n=5).to(dtype)
    chain = Chain(SCHEDULE, GRID, kind)  # type: ignore[arg-type]
    index = torch.tensor([9, 0, 4, 9, 8])
    times = GRID.times[index]
    assert torch.equal(chain.index(times), index)
    x = diffuse(SCHEDULE, x0, times, Noise(2).like(x0))
    shape = (-1, 1, 1, 1)
    scales = SCHEDULE.alpha(times).to(x).reshape(shape), SCHEDULE.sigma(times).to(x).reshape(shape)
    raw = Noise(5).like(x0).requires_grad_(True)
    guess = (x0 + 0.05 * Noise(3).like(x0)).requires_grad_(True)
    prediction = Prediction.from_x0(x, guess, *scales, variance_fraction=raw)
    together = chain.term(prediction, x0, index)
    assert together.dtype == dtype
    for row, one in enumerate(index.tolist()):
        alone = replace(prediction, x=x[row : row + 1], x0=guess[row : row + 1], variance_fraction=raw[row : row + 1])
        # float32 coefficients: a thousandth of a nat comes from differences of means near one.
        tolerance = 1e-10 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(
            together[row : row + 1], chain.term(alone, x0[row : row + 1], one), rtol=tolerance, atol=tolerance
        )
    slopes = torch.autograd.grad(together.sum(), [guess, raw], allow_unused=True)
    assert slopes[0] is not None
    assert bool(torch.isfinite(slopes[0]).all())
    assert (slopes[1] is not None) == (kind == "learned")


def test_a_perfect_prediction_costs_nothing_but_the_reconstruction() -> None:
    x0 = pictures()
    chain = Chain(SCHEDULE, GRID, "small")
    for index in range(9):
        assert float(chain.term(predicted(index, x0, error=0.0), x0, index).abs().max()) < 1e-12
    assert float(chain.term(predicted(9, x0, error=0.0), x0, 9).min()) > 0


@given(st.floats(-1, 1))
def test_prior_matching(value: float) -> None:
    x0 = torch.full((2, 1, 2, 2), value, dtype=torch.float64)
    a, s = level(SCHEDULE, 1000)
    closed = 0.5 * (s**2 + (a * value) ** 2 - 1 - math.log(s**2))
    torch.testing.assert_close(
        Chain(SCHEDULE, GRID).prior(x0), torch.full((2,), closed).double(), rtol=1e-6, atol=1e-14
    )
    edm = schedules.edm()
    # Exploding variance: the sampler starts from N(0, σ_max²), and a = 1 leaves ½ (x_0/σ_max)².
    exploding = Chain(edm, grids.karras(edm, 10), levels=None).prior(x0)
    torch.testing.assert_close(exploding, torch.full((2,), 0.5 * (value / 80) ** 2).double(), rtol=1e-6, atol=1e-15)


class TestRefusals:
    def test_grids_that_do_not_end_clean(self) -> None:
        for grid in (grids.trailing(SCHEDULE, 10, terminal="last"), GRID.reversed()):
            with refused("unsupported", "grid"):
                Chain(SCHEDULE, grid)

    def test_grids_of_another_schedule(self) -> None:
        with refused("mismatch", "time"):
            Chain(schedules.cosine(100), GRID)

    def test_unknown_variance(self) -> None:
        with refused("unknown", "variance"):
            Chain(SCHEDULE, GRID, "learnt")  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", ["learned", "optimal"])
    def test_a_variance_that_the_model_does_not_give(self, kind: str) -> None:
        with refused("unsupported", "variance"):
            Chain(SCHEDULE, GRID, kind).reverse(predicted(1, pictures()), 1)  # type: ignore[arg-type]

    def test_a_time_that_the_grid_does_not_visit(self) -> None:
        with refused("mismatch", "times"):
            Chain(SCHEDULE, GRID).index(torch.tensor([1000.0, 950.0]))
