"""The diffusion objective: what it minimises, what it shows the network, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.conditioning import ClassLabels
from carrara.objectives import DiffusionObjective, Examples, LossAwareTimes, UniformTimes, Weight
from carrara.objectives.diffusion import quarters
from carrara.process import Chain, GaussianMixture, Noise, Predicts, Schedule, grids, schedules
from carrara.process.parameterisation import target
from tests.errors import refused

KINDS: list[Predicts] = ["eps", "x0", "v", "flow", "edm", "previous"]
SCHEDULE = schedules.linear(50)


class Network(nn.Module):
    """A small network that remembers what it was shown."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, channels, 1)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.shown, self.time, self.condition = x.detach(), time, condition
        out: Tensor = self.layer(x) + 0.001 * time.reshape(-1, 1, 1, 1).to(x)
        return out


def examples(n: int = 6) -> Examples:
    x0 = (Noise(1).uniform((n, 1, 4, 4)) * 255).round() / 127.5 - 1
    return Examples(x0.float(), Condition(label=torch.arange(n)))


@pytest.mark.parametrize("predicts", KINDS)
def test_the_squared_error_of_the_prediction(predicts: Predicts) -> None:
    network = Network()
    objective = DiffusionObjective(network, SCHEDULE, predicts)
    batch = examples()
    terms = objective.terms(batch, Noise(3).at(7), "network")
    eps = Noise(3).at(7).normal((6, 1, 4, 4))
    times = network.time.double() + 1
    wanted = target(predicts, SCHEDULE, batch.x0, eps, times)
    predicted = network.layer(network.shown) + 0.001 * network.time.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(terms.per_sample, (predicted - wanted).square().mean((1, 2, 3)))
    assert terms.per_sample.requires_grad
    assert not terms.scalars["mse"].requires_grad
    assert terms.per_sample.dtype == torch.float32


@pytest.mark.parametrize("predicts", [k for k in KINDS if k != "previous"])
@pytest.mark.parametrize("schedule", [schedules.edm(), schedules.rectified_flow(), schedules.vp_sde()], ids=repr)
def test_continuous_schedules(schedule: Schedule, predicts: Predicts) -> None:
    if predicts == "eps" and float(schedule.alpha(schedule.final_time)) == 0:
        return
    terms = DiffusionObjective(Network(), schedule, predicts, weight=Weight("min_snr")).terms(
        examples(), Noise(3), "network"
    )
    assert bool(torch.isfinite(terms.per_sample).all())


@pytest.mark.parametrize("predicts", KINDS)
def test_the_exact_denoiser_minimises_it(predicts: Predicts) -> None:
    # The output of an exact network, plus an error e, costs E e² more than the exact network itself.
    oracle = GaussianMixture([1, 2], Noise(1).normal((2, 1, 2, 2), dtype=torch.float64), [0.1, 0.3])
    exact, n = oracle.denoiser(SCHEDULE), 4000

    class Exact(nn.Module):
        def __init__(self, error: float) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            times = time + 1
            if predicts == "edm":  # it was shown x/√n
                a, s = (f(times).reshape(-1, 1, 1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
                x = x * (s**2 + a**2 / 4).sqrt()
            prediction = exact(x, times, condition)
            return target(predicts, SCHEDULE, prediction.x0, prediction.eps, times) + self.error

    batch = Examples(oracle.sample(n, Noise(4)))
    costs = {
        e: DiffusionObjective(Exact(e), SCHEDULE, predicts).terms(batch, Noise(5), "network").per_sample
        for e in (0.0, 0.3)
    }
    extra = costs[0.3] - costs[0.0] - 0.09
    assert abs(float(extra.mean())) < 6 * float(extra.std()) / math.sqrt(n)


def test_rows_do_not_depend_on_their_batch() -> None:
    batch = examples()
    objective = DiffusionObjective(Network(), SCHEDULE, conditioners=(ClassLabels(tuple("abcdefghi"), 0.5),))
    draw = Noise(3).rows(range(100, 106)).at(4)
    whole = objective.terms(batch, draw, "network").per_sample
    for i in range(6):
        alone = Examples(batch.x0[i : i + 1], batch.condition.rows(slice(i, i + 1)))
        one = objective.terms(alone, Noise(3).rows([100 + i]).at(4), "network").per_sample
        torch.testing.assert_close(one, whole[i : i + 1])


def test_each_sample_is_dropped_on_its_own() -> None:
    network, n = Network(), 4000
    batch = Examples(torch.zeros(n, 1, 1, 1), Condition(label=torch.zeros(n, dtype=torch.int64)))
    conditioners = (ClassLabels(tuple("abcdefghi"), 0.1),)
    DiffusionObjective(network, SCHEDULE, conditioners=conditioners).terms(batch, Noise(1), "network")
    assert network.condition.label is not None
    dropped = int((network.condition.label == 9).sum())
    assert abs(dropped - 0.1 * n) < 6 * math.sqrt(0.09 * n)


def test_importance_weights_and_history() -> None:
    schedule = schedules.linear(21)
    times = LossAwareTimes(schedule, history=1)
    objective = DiffusionObjective(Network(), schedule, times=times)
    for level in times.levels.tolist():
        times.observe(torch.tensor([level]), torch.tensor([level]), [0])
        times.end_step()
    before = times.history.clone()
    probabilities = times.probabilities()
    terms = objective.terms(examples(), Noise(2), "network")
    assert torch.equal(times.history, before), "micro-batches of one step draw alike"
    objective.end_step()
    assert not torch.equal(times.history, before)
    # The mean squared error, logged in addition, carries no weights.
    drawn, importance = LossAwareTimes.draw(
        _frozen(probabilities, times), schedule, Noise(2).uniform((6, 1), sub=1)[:, 0]
    )
    torch.testing.assert_close(terms.per_sample, terms.scalars["mse"] * importance.float())
    assert torch.equal(times.history[drawn.long() - 1, -1].float().sort().values, terms.scalars["mse"].sort().values)
    saved = objective.state_dict()
    other = DiffusionObjective(Network(), schedule, times=LossAwareTimes(schedule, history=1))
    other.load_state_dict(saved)
    assert isinstance(other.times, LossAwareTimes)
    assert torch.equal(other.times.history, times.history)
    with torch.no_grad():  # a validation pass teaches nothing
        objective.terms(examples(), Noise(9), "network")
        objective.end_step()
    assert torch.equal(other.times.history, times.history)


def _frozen(probabilities: Tensor, times: LossAwareTimes) -> Any:
    class Frozen:
        levels = times.levels

        def probabilities(self) -> Tensor:
            return probabilities

    return Frozen()


def test_the_bound_is_what_its_terms_estimate() -> None:
    # Over every t once, the mean of T·L_t is the bound without its prior.
    chain = Chain(SCHEDULE, grids.trailing(SCHEDULE, 50), "large")
    objective = DiffusionObjective(Network(), SCHEDULE, "x0", loss="vlb", chain=chain)
    x0 = examples(1).x0.expand(50, -1, -1, -1)
    times = torch.arange(1, 51, dtype=torch.float64)
    eps = Noise(1).normal(x0.shape)
    loss, scalars = objective.losses(x0, times, eps, Condition())
    torch.testing.assert_close(loss, 50 * scalars["vb"])
    loss.mean().backward()
    assert objective.network.layer.weight.grad is not None  # type: ignore[union-attr]


def test_levels_of_the_data_change_the_reconstruction() -> None:
    x0 = (Noise(1).uniform((5, 1, 3, 3)) * 16).round().float() / 8 - 1
    times, eps = torch.ones(5, dtype=torch.float64), Noise(2).normal(x0.shape)
    values = []
    network = Network()
    for levels in (17, 256, None):
        chain = Chain(SCHEDULE, grids.trailing(SCHEDULE, 50), levels=levels)
        objective = DiffusionObjective(network, SCHEDULE, loss="vlb", chain=chain)
        values.append(float(objective.losses(x0, times, eps, Condition())[0].detach().mean()))
    # Wider bins hold more probability.
    assert values[0] < values[1]
    assert values[2] != values[1]


def test_quarters() -> None:
    table = schedules.linear(1000)
    counted = quarters(table, torch.tensor([1.0, 250.0, 251.0, 500.0, 501.0, 751.0, 1000.0]))
    # guided-diffusion's int(4 t/T), t from 0.
    assert counted.tolist() == [0, 0, 1, 1, 2, 3, 3]
    edm = schedules.edm()
    assert quarters(edm, torch.tensor([0.002, 0.01, 0.1, 1.0, 80.0])).tolist() == [0, 0, 1, 2, 3]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            ({"loss": "hybird"}, "unknown"),
            ({"learned_variance": True}, "conflict"),
            ({"loss": "hybrid"}, "conflict"),
        ],
    )
    def test_settings_that_cannot_train(self, arguments: dict[str, Any], code: Any) -> None:
        with refused(code, "objective.loss"):
            DiffusionObjective(Network(), SCHEDULE, **arguments)

    def test_a_bound_without_a_chain(self) -> None:
        with refused("missing", "chain"):
            DiffusionObjective(Network(), schedules.edm(), loss="vlb")

    def test_eps_at_zero_snr_is_refused(self) -> None:
        schedule = schedules.zero_terminal_snr(SCHEDULE)
        with refused("conflict", "objective.predicts"):
            DiffusionObjective(Network(), schedule, "eps")
        DiffusionObjective(Network(), schedule, "v")

    @pytest.mark.parametrize("predicts", ["v", "x0", "edm"])
    def test_a_weight_that_never_trains_the_level_where_sampling_starts(self, predicts: Predicts) -> None:
        schedule = schedules.zero_terminal_snr(SCHEDULE)
        with refused("conflict", "objective.weight"):
            DiffusionObjective(Network(), schedule, predicts, weight=Weight("min_snr"))
        objective = DiffusionObjective(Network(), schedule, predicts, weight=Weight("min_snr", floor=0.1))
        assert bool(torch.isfinite(objective.terms(examples(200), Noise(1), "network").per_sample).all())

    def test_a_network_of_the_wrong_width(self) -> None:
        with refused("shape", "network"):
            DiffusionObjective(Network(2), SCHEDULE).terms(examples(), Noise(), "network")

    def test_a_time_that_the_chain_does_not_visit(self) -> None:
        chain = Chain(SCHEDULE, grids.trailing(SCHEDULE, 5))
        objective = DiffusionObjective(
            Network(2), SCHEDULE, times=UniformTimes(), loss="hybrid", learned_variance=True, chain=chain
        )
        with refused("mismatch", "times"):
            objective.terms(examples(), Noise(), "network")
