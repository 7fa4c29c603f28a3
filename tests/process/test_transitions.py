"""Two-point transitions: the β forms, Bayes' rule, composition; the Gaussian's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from carrara.process import Gaussian, Noise, Schedule, Transition, diffuse, forward, marginal, posterior, schedules
from carrara.process.transitions import learned_log_variance
from tests.errors import refused
from tests.process.strategies import schedules_and_times

TABLES = [schedules.linear(1000), schedules.cosine(1000), schedules.scaled_linear(1000), schedules.linear(21)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return Noise(seed).normal(shape, dtype=torch.float64)


@pytest.mark.parametrize("schedule", TABLES, ids=repr)
@given(share=st.floats(0, 1))
def test_neighbours_give_the_beta_forms(schedule: schedules.Discrete, share: float) -> None:
    t = 1 + round(share * (schedule.final_time - 1))
    pair = Transition.of(schedule, t, t - 1)
    beta = float(schedule.betas[t - 1])
    now = float(schedule.alphas_cumprod[t - 1])
    before = float(schedule.alphas_cumprod[t - 2]) if t > 1 else 1.0
    # Both sides take differences of tabled numbers near one, good to an ulp of one.
    assert pair.alpha_ts == pytest.approx(math.sqrt(1 - beta), rel=1e-12, abs=1e-15)
    assert pair.variance == pytest.approx(beta, rel=1e-12, abs=1e-15)
    assert pair.posterior_variance == pytest.approx(beta * (1 - before) / (1 - now), rel=1e-12, abs=1e-15)
    assert pair.x_coefficient == pytest.approx(math.sqrt(1 - beta) * (1 - before) / (1 - now), rel=1e-11, abs=1e-15)
    assert pair.x0_coefficient == pytest.approx(math.sqrt(before) * beta / (1 - now), rel=1e-11, abs=1e-15)


@given(schedules_and_times(3))
def test_the_chain_of_q_composes(drawn: tuple[Schedule, list[float]]) -> None:
    schedule, times = drawn
    if len(times) < 3:
        return
    t, m, s = times
    far, first, second = Transition.of(schedule, t, s), Transition.of(schedule, m, s), Transition.of(schedule, t, m)
    assert far.alpha_ts == pytest.approx(second.alpha_ts * first.alpha_ts, rel=1e-12, abs=1e-15)
    # Variances add: the second step carries the first one's variance along.
    merged = second.alpha_ts**2 * first.variance + second.variance
    assert far.variance == pytest.approx(merged, rel=1e-10, abs=1e-14)


@given(schedules_and_times(2, clean=False))
def test_the_posterior_is_bayes_rule(drawn: tuple[Schedule, list[float]]) -> None:
    schedule, times = drawn
    if len(times) < 2:
        return
    t, s = times
    x0, x_s, x_t = normal(2, 3, seed=1), normal(2, 3, seed=2), normal(2, 3, seed=3)
    # q(x_s|x_t, x_0) q(x_t|x_0) = q(x_t|x_s) q(x_s|x_0), in logarithms.
    left = posterior(schedule, x_t, x0, t, s).log_prob(x_s) + marginal(schedule, x0, t).log_prob(x_t)
    right = forward(schedule, x_s, s, t).log_prob(x_t) + marginal(schedule, x0, s).log_prob(x_s)
    # Squares over the smallest variance in play magnify the rounding of the means.
    scale = 1 / min(float(schedule.sigma(s)) ** 2, Transition.of(schedule, t, s).posterior_variance)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9 + 1e-13 * scale)


@given(schedules_and_times(2))
def test_the_posterior_mean_s_eps_form(drawn: tuple[Schedule, list[float]]) -> None:
    schedule, times = drawn
    if len(times) < 2:
        return
    t, s = times
    pair = Transition.of(schedule, t, s)
    if pair.alpha_t == 0:
        return
    x0, eps = normal(2, 5), normal(2, 5, seed=1)
    x = diffuse(schedule, x0, t, eps)
    form = (x - pair.variance / pair.sigma_t * eps) / pair.alpha_ts
    torch.testing.assert_close(pair.posterior_mean(x, x0), form, rtol=1e-10, atol=1e-12 / pair.alpha_ts)


def test_a_pair_that_ends_clean_is_a_point() -> None:
    q = posterior(schedules.cosine(100), normal(1, 4), x0 := normal(1, 4, seed=1), 30, 0)
    assert torch.equal(q.draw(normal(1, 4, seed=2)), q.mean)
    torch.testing.assert_close(q.mean, x0, rtol=1e-14, atol=1e-14)


def test_times_of_every_sample_are_those_of_one() -> None:
    schedule = schedules.linear(1000)
    x0, eps, times = normal(3, 2, 2), normal(3, 2, 2, seed=1), torch.tensor([1.0, 500.5, 1000.0])
    together, q = diffuse(schedule, x0, times, eps), marginal(schedule, x0, times)
    for i, t in enumerate(times.tolist()):
        alone = marginal(schedule, x0[i : i + 1], t)
        torch.testing.assert_close(together[i : i + 1], diffuse(schedule, x0[i : i + 1], t, eps[i : i + 1]))
        torch.testing.assert_close(q.draw(eps)[i : i + 1], alone.draw(eps[i : i + 1]))


class TestReverseVariance:
    def test_the_floor_of_the_clean_pair_is_the_pair_before(self) -> None:
        schedule = schedules.linear(1000)
        before = Transition.of(schedule, 500, 250)
        assert Transition.of(schedule, 250, 0, 500).floor_variance() == before.posterior_variance
        assert Transition.of(schedule, 250, 0, None).floor_variance() == Transition.of(schedule, 250, 0).variance
        assert Transition.of(schedule, 500, 250, 750).floor_variance() == before.posterior_variance

    def test_a_learned_variance_reaches_both_ends_and_is_not_clamped(self) -> None:
        raw = torch.tensor([-1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
        expected = torch.tensor([0.1, 0.4, 0.2, 1.6], dtype=torch.float64).log()
        torch.testing.assert_close(learned_log_variance(raw, 0.1, 0.4), expected)


class TestGaussian:
    @given(st.floats(-5, 2), st.floats(-5, 2))
    def test_kl_is_torch_s(self, first: float, second: float) -> None:
        m1, m2 = normal(2, 3), normal(2, 3, seed=1)
        ours = Gaussian(m1, first).kl(Gaussian(m2, second))
        theirs = torch.distributions.kl_divergence(
            torch.distributions.Normal(m1, math.exp(first / 2)), torch.distributions.Normal(m2, math.exp(second / 2))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        mixed = Gaussian(m1, torch.full((2, 1), first).double()).kl(Gaussian(m2, second))
        torch.testing.assert_close(mixed, ours)

    def test_log_prob_is_torch_s(self) -> None:
        mean, x = normal(2, 3), normal(2, 3, seed=1)
        theirs = torch.distributions.Normal(mean, 0.3).log_prob(x)
        torch.testing.assert_close(Gaussian(mean, 2 * math.log(0.3)).log_prob(x), theirs)

    @pytest.mark.parametrize("cdf", ["erf", "tanh"])
    @pytest.mark.parametrize("levels", [2, 17, 256])
    @pytest.mark.parametrize("spread", [0.02, 0.3, 2.0])
    def test_bins_share_out_the_whole_probability(self, cdf: str, levels: int, spread: float) -> None:
        values = torch.linspace(-1, 1, levels, dtype=torch.float64).reshape(1, -1)
        gaussian = Gaussian(torch.full_like(values, 0.137), 2 * math.log(spread))
        total = float(gaussian.bin_log_prob(values, levels, cdf).exp().sum())  # type: ignore[arg-type]
        # The approximation is floored at 1e-12 a bin.
        assert total == pytest.approx(1, abs=1e-13 if cdf == "erf" else 1e-9)

    @given(st.floats(-1, 1), st.floats(-7, 1))
    def test_bins_are_integrals_of_the_density(self, mean: float, log_spread: float) -> None:
        x = torch.tensor([[-3 / 15, 5 / 15]], dtype=torch.float64)
        gaussian = Gaussian(torch.full_like(x, mean), 2 * log_spread)
        reference = torch.distributions.Normal(gaussian.mean, math.exp(log_spread))
        inside = reference.cdf(x + 1 / 15) - reference.cdf(x - 1 / 15)
        torch.testing.assert_close(gaussian.bin_log_prob(x, 16).exp(), inside, rtol=1e-9, atol=1e-13)

    def test_the_exact_form_is_finite_and_differentiable_far_out(self) -> None:
        x = torch.tensor([[-1.0, 0.2, 1.0]], dtype=torch.float32)
        mean = torch.tensor([[3.0, -2.0, -5.0]], requires_grad=True)
        value = Gaussian(mean, 2 * math.log(0.01)).bin_log_prob(x, 256)
        # Mills: ln P of a bin z standard deviations away is about -z²/2.
        z = torch.tensor([399.6, 219.6, 599.6])
        torch.testing.assert_close(value.detach()[0], -(z**2) / 2, rtol=1e-3, atol=0)
        (slope,) = torch.autograd.grad(value.sum(), mean)
        assert bool(torch.isfinite(slope).all())
        assert torch.equal(slope.sign(), torch.tensor([[-1.0, 1.0, 1.0]]))

    def test_an_image_of_one_level_is_refused(self) -> None:
        with refused("invalid", "levels"):
            Gaussian(torch.zeros(1, 1), 0.0).bin_log_prob(torch.zeros(1, 1), 1)
