"""EDM's four preconditionings and three losses, each as a schedule and a kind of prediction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.objectives import DiffusionObjective, LogNormalTimes, Weight
from carrara.process import NetworkDenoiser, Prediction, Predicts, Schedule, schedules
from tests.parity.reference import Reference

CASE = Reference("f4_edm_precond")


class Analytic(nn.Module):
    """The stored run's inner model; remembers what it was shown and told."""

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.shown, self.told = x, time
        out: Tensor = 0.5 * (2 * x).sin() + 0.3 * x * time.cos().reshape(-1, 1, 1, 1)
        return out


class Score(Analytic):
    """NCSN++ tells σ times the score, which is -ε, and is told ln(σ/2) where EDM's networks are told ln(σ)/4."""

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return -super().forward(x, 4 * time - math.log(2), condition)


class WholeTimes(Analytic):
    """A network of whole timesteps, told the nearest."""

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return super().forward(x, time.round(), condition)


def ask(network: nn.Module, schedule: Schedule, predicts: Predicts) -> Prediction:
    """The denoiser at EDM's (x, σ): its x is ours divided by a."""
    times = schedule.time_at(-2 * CASE.input("sigma").log())
    a = schedule.alpha(times).reshape(-1, 1, 1, 1)
    return NetworkDenoiser(network, schedule, predicts)(a * CASE.input("x"), times, Condition())


def check(name: str, network: Analytic, prediction: Prediction, atol_time: float) -> None:
    # The original's float32 rounding is multiplied by σ up to 60.
    torch.testing.assert_close(prediction.x0, CASE.output(f"{name}.denoised"), rtol=1e-5, atol=6e-5)
    torch.testing.assert_close(network.shown, CASE.output(f"{name}.model_x"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.told, CASE.output(f"{name}.c_noise"), rtol=1e-5, atol=atol_time)


def test_edm() -> None:
    network = Analytic()
    check("EDMPrecond", network, ask(network, schedules.edm(), "edm"), 1e-6)


def test_vp() -> None:
    network = Analytic()
    # Their inverse of σ(t) loses digits of t = 4e-4 at σ = 0.01.
    check("VPPrecond", network, ask(network, schedules.vp_sde(), "eps"), 2e-3)


def test_ve() -> None:
    network = Score()
    check("VEPrecond", network, ask(network, schedules.edm(0.02, 100.0), "eps"), 1e-6)


def test_iddpm() -> None:
    network = WholeTimes()
    check("iDDPMPrecond", network, ask(network, schedules.cosine(1000), "eps"), 1e-6)
    schedule = schedules.cosine(1000)
    whole = schedule.time_at(-2 * CASE.input("sigma").log()).round()
    nearest = (-schedule.log_snr(whole) / 2).exp()
    # Their table is float32, whose √(1/ᾱ - 1) at σ = 0.01 keeps three digits.
    torch.testing.assert_close(nearest, CASE.output("iDDPMPrecond.round_sigma"), rtol=1e-3, atol=0)


def losses(network: nn.Module, schedule: Schedule, predicts: Predicts, times: Tensor, weight: Weight) -> Tensor:
    objective = DiffusionObjective(network, schedule, predicts, weight=weight)
    return objective.losses(CASE.input("x0"), times, CASE.input("noise"), Condition())[0]


def mean(name: str) -> Tensor:
    return CASE.output(name).flatten(1).mean(1)


def test_edm_loss_and_its_times() -> None:
    schedule = schedules.edm()
    uniform = torch.special.ndtr(CASE.input("normal").flatten())
    times, importance = LogNormalTimes().draw(schedule, uniform)
    sigma = (1.2 * CASE.input("normal").flatten() - 1.2).exp()
    torch.testing.assert_close(times, sigma, rtol=1e-9, atol=0)
    assert bool((importance == 1).all())
    # EDM's weight on x_0 is the plain squared error of F; on any other kind it comes out the same.
    plain = losses(Analytic(), schedule, "edm", times, Weight())
    torch.testing.assert_close(plain, mean("EDMLoss.loss"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses(Analytic(), schedule, "edm", times, Weight("edm")), plain)


def test_vp_loss_is_the_squared_error_of_eps() -> None:
    schedule = schedules.vp_sde()
    times = 1 + CASE.input("uniform").flatten() * (1e-5 - 1)
    loss = losses(Analytic(), schedule, "eps", times, Weight())
    torch.testing.assert_close(loss, mean("VPLoss.loss"), rtol=1e-4, atol=1e-4)


def test_ve_loss_is_the_squared_error_of_eps() -> None:
    schedule = schedules.edm(0.02, 100.0)
    sigma = 0.02 * (100.0 / 0.02) ** CASE.input("uniform").flatten()
    loss = losses(Score(), schedule, "eps", sigma, Weight())
    torch.testing.assert_close(loss, mean("VELoss.loss"), rtol=1e-4, atol=1e-4)
