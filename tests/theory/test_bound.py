"""The bound on the exact oracle: never below the exact likelihood, closing as T grows; its two decompositions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.evaluation import bits_per_dimension, flow_likelihood
from carrara.process import (
    Chain,
    Gaussian,
    GaussianMixture,
    Grid,
    Noise,
    Schedule,
    diffuse,
    forward,
    grids,
    schedules,
)

SHAPE = (2, 3)
MIXTURE = GaussianMixture([1, 2, 3, 1], Noise(1).normal((4, *SHAPE), dtype=torch.float64), [0.04, 0.2, 0.1, 0.5])


def exact(x: Tensor) -> Tensor:
    """-ln p(x), nats per dimension."""
    return -MIXTURE.log_prob(x) / math.prod(SHAPE)


def excess(schedule: Schedule, grid: Grid, variance: str, images: int = 1500) -> tuple[float, float]:
    """How far the bound lies above the exact likelihood: mean over images, and its standard error."""
    x = MIXTURE.sample(images, Noise(3))
    bound = bits_per_dimension(
        MIXTURE.denoiser(schedule),
        x,
        grid,
        levels=None,
        variance=variance,  # type: ignore[arg-type]
        noise=Noise(4),
        batch_size=images,
    )
    assert bound.unit == "nats/dim"
    gap = bound.total - exact(x)
    return float(gap.mean()), float(gap.std()) / math.sqrt(images)


@pytest.mark.parametrize(
    ("variance", "last"),
    # What is left at T = 400: "small" closes about as 1/√T, the others as 1/T.
    [("small", 0.7), ("large", 0.01), ("optimal", 0.01)],
)
def test_the_bound_lies_above_and_closes_as_t_grows(variance: str, last: float) -> None:
    found = []
    for steps in (25, 100, 400):
        schedule = schedules.linear(steps)
        found.append(excess(schedule, grids.trailing(schedule, steps), variance))
    # Never below, but for the noise of one draw a level.
    assert all(gap > -4 * error for gap, error in found)
    (first, first_error), (_, _), (final, final_error) = found
    assert final < last + 4 * final_error
    if variance != "optimal":  # whose excess is lost in the noise from the start
        assert first - final > 5 * math.hypot(first_error, final_error)


@pytest.mark.parametrize("spacing", [grids.trailing, grids.log_snr])
def test_more_levels_of_one_schedule_close_it_too(spacing: Callable[[Schedule, int], Grid]) -> None:
    schedule = schedules.linear(1000)
    found = [excess(schedule, spacing(schedule, steps), "large") for steps in (10, 40, 160)]
    for (gap, error), (finer, finer_error) in itertools.pairwise(found):
        assert gap - finer > 3 * math.hypot(error, finer_error)
    assert found[-1][0] > -4 * found[-1][1]


@pytest.mark.parametrize(
    ("schedule", "grid"),
    [
        (schedules.edm(), grids.log_snr(schedules.edm(), 200)),
        (schedules.vp_sde(), grids.log_snr(schedules.vp_sde(), 200)),
        (schedules.rectified_flow(), grids.trailing(schedules.rectified_flow(), 200)),
    ],
    ids=["edm", "vp_sde", "rectified_flow"],
)
def test_the_bound_holds_on_continuous_schedules(schedule: Schedule, grid: Grid) -> None:
    gap, error = excess(schedule, grid, "optimal")
    assert -4 * error < gap < 0.6


class TestTwoDecompositions:
    """docs/math.md §4: terms by Bayes' rule, each a KL of known Gaussians, or the ratios of the chain itself."""

    steps, images = 25, 4000
    schedule = schedules.linear(25)
    grid = grids.trailing(schedule, 25)
    chain = Chain(schedule, grid, "large", levels=None)
    x0 = MIXTURE.sample(1, Noise(3)).expand(images, *SHAPE)

    def reverse(self, x: Tensor, index: int) -> Gaussian:
        prediction = MIXTURE.denoiser(self.schedule)(x, self.grid.pairs()[index][0], Condition())
        return self.chain.reverse(prediction, index)

    def by_bayes(self) -> Tensor:
        bound = bits_per_dimension(
            MIXTURE.denoiser(self.schedule),
            self.x0,
            self.grid,
            levels=None,
            variance="large",
            noise=Noise(5),
            batch_size=self.images,
        )
        return bound.total

    def before_bayes(self) -> Tensor:
        """-ln p(x_0|x_1) + KL(q(x_T|x_{T-1}) ‖ p(x_T)) + Σ [ln q(x_t|x_{t-1}) - ln p(x_t|x_{t+1})], each term on
        draws of its own.

        x_{t+1} is drawn from x_t. Were both drawn from x_{t-1} alone, as writing the terms as
        KL(q(x_t|x_{t-1}) ‖ p(x_t|x_{t+1})) suggests, the sum would be another: see the test below.
        """
        total = torch.zeros(self.images, dtype=torch.float64)
        for index, (t, s) in enumerate(self.grid.pairs()):
            noise = Noise(6).at(index)
            entered = self.entered(s, noise)
            x_s = self.x0 if entered is None else entered.draw(noise.like(self.x0, sub=1))
            leaving = forward(self.schedule, x_s, s, t)
            x_t = leaving.draw(noise.like(self.x0, sub=2))
            total -= self.reverse(x_t, index).log_prob(x_s).flatten(1).sum(1)
            if entered is not None:
                total += entered.log_prob(x_s).flatten(1).sum(1)
            if index == 0:
                total += leaving.kl(Gaussian(torch.zeros_like(x_t), 0.0)).flatten(1).sum(1)
        return total / math.prod(SHAPE)

    def entered(self, s: float, noise: Noise) -> Gaussian | None:
        """q(x_s|x_r) for the cleaner neighbour r of s, x_r drawn; None at the clean point, which nothing enters."""
        if s == 0:
            return None
        r = next(cleaner for time, cleaner in self.grid.pairs() if time == s)
        return forward(self.schedule, diffuse(self.schedule, self.x0, r, noise.like(self.x0)), r, s)

    def test_they_agree_and_the_first_has_less_variance(self) -> None:
        first, second = self.by_bayes(), self.before_bayes()
        error = math.sqrt(float(first.var() + second.var()) / self.images)
        assert abs(float(first.mean() - second.mean())) < 5 * error
        assert float(second.var()) > 4 * float(first.var())
        # The agreement is sharp: dropping one of the 25 terms would show.
        assert error < 0.05

    def test_drawing_both_neighbours_from_the_step_before_is_another_sum(self) -> None:
        index = 12
        (t, s), (_, r) = self.grid.pairs()[index], self.grid.pairs()[index + 1]
        x_r = diffuse(self.schedule, self.x0, r, Noise(7).like(self.x0))
        q = forward(self.schedule, x_r, r, s)
        x_s = q.draw(Noise(8).like(x_r))
        joint = forward(self.schedule, x_s, s, t).draw(Noise(9).like(x_r))
        apart = forward(self.schedule, x_r, r, t).draw(Noise(10).like(x_r))
        ratio = (q.log_prob(x_s) - self.reverse(joint, index).log_prob(x_s)).flatten(1).sum(1)
        written = q.kl(self.reverse(apart, index)).flatten(1).sum(1)
        error = math.sqrt(float(ratio.var() + written.var()) / self.images)
        assert float(written.mean() - ratio.mean()) > 10 * error


class TestFlow:
    @pytest.mark.parametrize(
        "schedule",
        [
            schedules.linear(1000),
            schedules.cosine(1000),
            schedules.zero_terminal_snr(schedules.scaled_linear(1000)),
            schedules.edm(),
            schedules.rectified_flow(shift=2.0),
            schedules.vp_sde(),
            schedules.trigonometric(),
        ],
        ids=lambda s: str(s.spec["kind"]),
    )
    def test_the_exact_trace_is_exact(self, schedule: Schedule) -> None:
        x = MIXTURE.sample(20, Noise(3))
        a, s = float(schedule.alpha(schedule.final_time)), float(schedule.sigma(schedule.final_time))

        def prior(last: Tensor) -> Tensor:
            return MIXTURE.log_prob(last, max(a, 1e-9), s)

        ours = flow_likelihood(MIXTURE.denoiser(schedule), x, steps=60, trace="exact", levels=None, prior=prior)
        assert float((ours.value - exact(x)).abs().max()) < 1e-3
        assert ours.interval()[0] is not None
        # With the sampler's own noise as the prior, the mean over images is as close.
        plain = flow_likelihood(MIXTURE.denoiser(schedule), x, steps=60, trace="exact", levels=None)
        assert abs(float((plain.value - exact(x)).mean())) < 1e-3

    def test_the_error_falls_with_the_fourth_power_of_the_step(self) -> None:
        schedule, x = schedules.cosine(1000), MIXTURE.sample(3, Noise(3))
        fine = flow_likelihood(MIXTURE.denoiser(schedule), x, steps=240, trace="exact", levels=None).value
        errors = [
            float(
                (flow_likelihood(MIXTURE.denoiser(schedule), x, steps=n, trace="exact", levels=None).value - fine)
                .abs()
                .mean()
            )
            for n in (40, 80)
        ]
        assert math.log2(errors[0] / errors[1]) > 3.85

    def test_hutchinson_s_interval_holds_the_exact_trace(self) -> None:
        schedule, x = schedules.linear(1000), MIXTURE.sample(200, Noise(3))
        trace = flow_likelihood(MIXTURE.denoiser(schedule), x, steps=15, trace="exact", levels=None, batch_size=200)
        guess = flow_likelihood(
            MIXTURE.denoiser(schedule), x, steps=15, probes=12, levels=None, noise=Noise(8), batch_size=200
        )
        low, high = guess.interval(0.95)
        held = float(((low <= trace.value) & (trace.value <= high)).double().mean())
        # 95 % of 200, four binomial standard deviations down; sums of signs are lighter in the tail than Student's.
        assert held > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 200)
        mean_error = (guess.estimates.mean(0) - trace.value.mean()).std() / math.sqrt(12)
        assert abs(float(guess.value.mean() - trace.value.mean())) < 5 * float(mean_error)

    def test_the_bound_lies_above_the_flow(self) -> None:
        schedule, x = schedules.linear(200), MIXTURE.sample(100, Noise(3))
        flow = flow_likelihood(MIXTURE.denoiser(schedule), x, steps=30, trace="exact", levels=None).value
        bound = bits_per_dimension(MIXTURE.denoiser(schedule), x, levels=None).total
        assert float((bound - flow).mean()) > 0
