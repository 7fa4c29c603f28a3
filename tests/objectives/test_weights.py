"""Weights: one agreement on x̂_0 or ε̂, the same loss for every kind of prediction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.objectives import Weight, WeightKind
from carrara.process import Noise, Predicts, Schedule, diffuse, schedules
from carrara.process.parameterisation import target, to_prediction
from tests.errors import refused
from tests.process.strategies import SCHEDULES, place

KINDS: list[Predicts] = ["eps", "x0", "v", "flow", "edm", "previous"]
GAMMA = 5.0


def agreed(kind: WeightKind, schedule: Schedule, t: Tensor) -> Tensor:
    """The weight on ‖x_0 - x̂_0‖²."""
    snr = schedule.log_snr(t).exp()
    if kind == "min_snr":
        return snr.clamp(max=GAMMA)
    if kind == "p2":
        return snr / (1 + snr)
    sigma = snr**-0.5
    return (sigma**2 + 0.25) / (sigma * 0.5) ** 2


@pytest.mark.parametrize(
    ("schedule", "predicts"),
    # "previous" is known on tables only.
    [(s, p) for s in SCHEDULES for p in KINDS if s.discrete or p != "previous"],
    ids=lambda value: str(value.spec["kind"]) if isinstance(value, Schedule) else value,
)
@pytest.mark.parametrize("kind", ["min_snr", "p2", "edm"])
def test_every_prediction_minimises_the_same(kind: WeightKind, predicts: Predicts, schedule: Schedule) -> None:
    times = torch.tensor([place(schedule, share) for share in (0.0, 0.1, 0.5, 0.97)], dtype=torch.float64)
    times = times.clamp(max=schedule.final_time - (1 if schedule.discrete else 1e-3))
    x0, eps = (Noise(i).normal((4, 7), dtype=torch.float64) for i in (1, 2))
    x = diffuse(schedule, x0, times, eps)
    exact = target(predicts, schedule, x0, eps, times)
    wrong = exact + 0.1 * Noise(3).normal((4, 7), dtype=torch.float64)
    prediction = to_prediction(predicts, schedule, x, times, wrong)
    own = Weight(kind, gamma=GAMMA)(predicts, schedule, times) * (wrong - exact).square().mean(1)
    on_x0 = agreed(kind, schedule, times) * (prediction.x0 - x0).square().mean(1)
    # At t = 1 the SNR is 1e4 and more: x̂_0 - x_0 keeps eleven digits.
    torch.testing.assert_close(own, on_x0, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("t", [1.0, 200.0, 700.0, 1000.0])
def test_the_published_forms(t: float) -> None:
    schedule, time = schedules.linear(1000), torch.tensor([t], dtype=torch.float64)
    snr = schedule.log_snr(time).exp()
    capped = snr.clamp(max=GAMMA)
    expected = {
        ("min_snr", "eps"): capped / snr,
        ("min_snr", "v"): capped / (snr + 1),
        ("min_snr", "x0"): capped,
        ("p2", "eps"): 1 / (1 + snr),
        ("uniform", "eps"): torch.ones(1, dtype=torch.float64),
    }
    for (kind, predicts), value in expected.items():
        torch.testing.assert_close(Weight(kind, GAMMA)(predicts, schedule, time), value, rtol=1e-10, atol=0)  # type: ignore[arg-type]
    flow, share = schedules.rectified_flow(), torch.tensor([t / 1001], dtype=torch.float64)
    ratio = flow.log_snr(share).exp()
    closed = ratio.clamp(max=GAMMA) / (1 + ratio.sqrt()) ** 2
    torch.testing.assert_close(Weight("min_snr", GAMMA)("flow", flow, share), closed, rtol=1e-10, atol=0)
    edm, sigma = schedules.edm(), torch.tensor([t / 20], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(Weight("edm")("edm", edm, sigma), one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["uniform", "min_snr", "p2", "edm"])
@pytest.mark.parametrize("predicts", KINDS)
def test_zero_snr_is_never_nan(kind: WeightKind, predicts: Predicts) -> None:
    schedule = schedules.zero_terminal_snr(schedules.linear(100))
    times = torch.tensor([1.0, 99.0, 100.0], dtype=torch.float64)
    value = Weight(kind)(predicts, schedule, times)
    assert bool(torch.isfinite(value).all())
    if kind in ("min_snr", "p2"):
        # 1 for ε, and nothing for the others.
        assert float(value[-1]) == pytest.approx(1.0 if predicts == "eps" else 0.0, abs=1e-12)
        assert float(Weight(kind, floor=0.2)(predicts, schedule, times)[-1]) >= 0.2


def test_nonsense_is_refused() -> None:
    with refused("unknown", "objective.weight.kind"):
        Weight("minsnr")  # type: ignore[arg-type]
    for wrong in ({"gamma": 0.0}, {"floor": -1.0}, {"gamma": float("nan")}):
        with refused("invalid", "objective.weight"):
            Weight("min_snr", **wrong)
