"""Which levels are visited: distributions, importance weights, the loss history and its state."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from carrara.objectives import LogitNormalTimes, LogNormalTimes, LossAwareTimes, TimeSampler, UniformTimes
from carrara.process import Noise, Schedule, grids, schedules
from tests.errors import refused

N = 100_000
UNIFORM = Noise(1).uniform((N,))
SIX = 6.0  # standard errors: a false alarm once in 1e9 tries


def moments_fit(values: Tensor, mean: float, variance: float) -> None:
    assert abs(float(values.mean()) - mean) < SIX * math.sqrt(variance / N)
    assert abs(float(values.var()) - variance) < SIX * float((values - mean).pow(4).mean() / N) ** 0.5


def test_uniform_over_a_table() -> None:
    times, weights = UniformTimes().draw(schedules.linear(50), UNIFORM)
    counts = torch.bincount(times.long(), minlength=51)
    assert int(counts[0]) == 0
    assert len(counts) == 51
    # χ² over 49 degrees of freedom.
    chi_squared = float(((counts[1:] - N / 50) ** 2 / (N / 50)).sum())
    assert abs(chi_squared - 49) < SIX * math.sqrt(98)
    assert bool((weights == 1).all())


def test_uniform_over_a_grid_and_a_continuous_schedule() -> None:
    schedule = schedules.linear(1000)
    grid = grids.trailing(schedule, 10)
    times, _ = UniformTimes(grid).draw(schedule, UNIFORM)
    assert sorted(set(times.tolist())) == sorted(grid.times[:-1].tolist())
    flow = schedules.rectified_flow(first_time=0.2)
    times, _ = UniformTimes().draw(flow, UNIFORM)
    assert 0.2 <= float(times.min()) < float(times.max()) <= 1
    moments_fit(times, 0.6, 0.64 / 12)


def test_logit_normal() -> None:
    times, weights = LogitNormalTimes(0.3, 0.8).draw(schedules.rectified_flow(), UNIFORM)
    moments_fit(torch.logit(times), 0.3, 0.64)
    assert bool((weights == 1).all())


def test_edm_s_log_normal() -> None:
    times, _ = LogNormalTimes().draw(schedules.edm(1e-9, 1e9), UNIFORM)
    moments_fit(times.log(), -1.2, 1.44)


@pytest.mark.parametrize("sampler", [UniformTimes(), LogitNormalTimes(), LogNormalTimes()])
@pytest.mark.parametrize(
    "schedule",
    [schedules.linear(100), schedules.edm(), schedules.rectified_flow(shift=3), schedules.vp_sde()],
    ids=lambda s: str(s.spec["kind"]),
)
def test_every_sampler_stays_on_every_schedule(sampler: TimeSampler, schedule: Schedule) -> None:
    times, _ = sampler.draw(schedule, torch.tensor([2.0**-33, 0.5, 1 - 2.0**-33], dtype=torch.float64))
    assert float(times.min()) >= schedule.first_time
    assert float(times.max()) <= schedule.final_time
    if schedule.discrete:
        assert torch.equal(times, times.round())


class TestLossAware:
    schedule = schedules.linear(30)

    def warm(self, sampler: LossAwareTimes, scale: float = 1.0) -> None:
        for turn in range(sampler.history.shape[1]):
            losses = scale * (sampler.levels + turn)
            sampler.observe(sampler.levels, losses, range(len(losses)))
            sampler.end_step()

    def test_is_uniform_until_every_level_is_known(self) -> None:
        sampler = LossAwareTimes(self.schedule, history=2)
        every = sampler.levels
        sampler.observe(every, torch.ones(30), range(30))
        sampler.observe(every[:-1], torch.ones(29), range(29))
        sampler.end_step()
        assert not sampler.warm
        times, weights = sampler.draw(self.schedule, UNIFORM)
        plain, _ = UniformTimes().draw(self.schedule, UNIFORM)
        assert torch.equal(times, plain)
        torch.testing.assert_close(weights, torch.ones(N, dtype=torch.float64))

    def test_importance_weights_keep_the_expectation(self) -> None:
        sampler = LossAwareTimes(self.schedule)
        self.warm(sampler)
        times, weights = sampler.draw(self.schedule, UNIFORM)
        # Exactly: Σ p_t f(t)/(p_t T) = mean f. And by drawing, within six standard errors.
        values = weights * times**2
        exact = float((sampler.levels**2).mean())
        assert abs(float(values.mean()) - exact) < SIX * float(values.std()) / math.sqrt(N)
        counts = torch.bincount(times.long() - 1, minlength=30).double()
        expected = sampler.probabilities() * N
        assert abs(float(((counts - expected) ** 2 / expected).sum()) - 29) < SIX * math.sqrt(58)

    def test_weights_are_the_root_of_the_mean_square(self) -> None:
        sampler = LossAwareTimes(self.schedule, history=3, uniform=0.01)
        self.warm(sampler)
        root = torch.stack([sampler.levels + turn for turn in range(3)]).square().mean(0).sqrt()
        expected = 0.99 * root / root.sum() + 0.01 / 30
        torch.testing.assert_close(sampler.probabilities(), expected)

    def test_processes_and_micro_batches_together_know_what_one_batch_would(self) -> None:
        # Positions interleave over two processes, and times repeat within a batch.
        times = torch.tensor([3.0, 3.0, 5.0, 3.0, 5.0, 3.0, 3.0, 3.0])
        losses, positions = torch.arange(8.0), list(range(40, 48))
        one = LossAwareTimes(self.schedule, history=4)
        one.observe(times, losses, positions)
        one.end_step()
        parts = LossAwareTimes(self.schedule, history=4)
        for part in (slice(0, 3), slice(3, 8)):  # as micro-batches note them
            parts.observe(times[part], losses[part], positions[part])
        parts.end_step()
        assert torch.equal(parts.history, one.history)
        sent: list[Tensor] = []
        for rank in range(2):

            def send(rows: Tensor) -> Tensor:
                sent.append(rows)
                return rows

            spy = LossAwareTimes(self.schedule, history=4, gather=send)
            spy.observe(times[rank::2], losses[rank::2], positions[rank::2])
            spy.end_step()
        whole = torch.cat(sent)
        for rank in range(2):
            both = LossAwareTimes(self.schedule, history=4, gather=lambda rows: whole)
            both.observe(times[rank::2], losses[rank::2], positions[rank::2])
            both.end_step()
            assert torch.equal(both.history, one.history)
            assert torch.equal(both.counts, one.counts)
        # Equal t in the order of the global positions: the newest four of 0, 1, 3, 5, 6, 7.
        assert one.history[2].tolist() == [3.0, 5.0, 6.0, 7.0]

    def test_its_memory_survives_a_checkpoint(self) -> None:
        first = LossAwareTimes(self.schedule, history=2)
        self.warm(first)
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        second = LossAwareTimes(self.schedule, history=2)
        second.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(first.probabilities(), second.probabilities())
        first.observe(torch.tensor([4.0]), torch.tensor([9.0]), [0])
        first.end_step()
        assert not torch.equal(first.history, second.history)

    def test_losses_that_are_not_finite_are_forgotten(self) -> None:
        sampler = LossAwareTimes(self.schedule, history=1)
        self.warm(sampler)
        sampler.observe(torch.tensor([4.0, 5.0]), torch.tensor([math.nan, math.inf]), [0, 1])
        sampler.end_step()
        assert bool(torch.isfinite(sampler.probabilities()).all())

    def test_losses_of_zero_leave_it_uniform(self) -> None:
        sampler = LossAwareTimes(self.schedule, history=1)
        self.warm(sampler, scale=0.0)
        torch.testing.assert_close(sampler.probabilities(), torch.full((30,), 1 / 30, dtype=torch.float64))

    def test_a_respaced_process(self) -> None:
        grid = grids.trailing(self.schedule, 5)
        sampler = LossAwareTimes(self.schedule, grid, history=1)
        assert sampler.levels.tolist() == [6, 12, 18, 24, 30]
        self.warm(sampler)
        times, _ = sampler.draw(self.schedule, UNIFORM)
        assert set(times.tolist()) <= {6, 12, 18, 24, 30}

    def test_refusals(self) -> None:
        with refused("missing", "grid"):
            LossAwareTimes(schedules.edm())
        for wrong in ({"history": 0}, {"uniform": 0.0}):
            with refused("invalid", "objective.times"):
                LossAwareTimes(self.schedule, **wrong)
        with refused("mismatch", "objective.times"):
            LossAwareTimes(self.schedule).load_state_dict(LossAwareTimes(schedules.linear(50)).state_dict())
        with refused("mismatch", "objective.times"):
            UniformTimes().load_state_dict({"history": torch.zeros(1)})
