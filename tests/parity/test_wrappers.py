"""k-diffusion's denoiser wrappers: what their networks are shown and told, what comes out, what is minimised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.objectives import DiffusionObjective
from carrara.process import NetworkDenoiser, Predicts, Schedule, schedules
from tests.parity.reference import Reference

CASE = Reference("f2_kdiffusion_wrappers")


class Analytic(nn.Module):
    """The stored run's inner model; remembers what it was shown and told."""

    def __init__(self, wrapper: str = "") -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        if self.wrapper == "eps_quant":  # tells the nearest whole timestep
            time = time.round()
        if self.wrapper in ("karras", "simple"):  # tell σ, and leave ln(σ)/4 to the network
            time = (4 * time).exp()
        self.shown, self.told = x, time
        out: Tensor = 0.5 * (2 * x).sin() + 0.3 * x * (time / 300).cos().reshape(-1, 1, 1, 1)
        return out


def table() -> Schedule:
    return schedules.from_alphas_cumprod(CASE.input("alphas_cumprod"))


WRAPPERS: dict[str, tuple[Schedule | None, Predicts]] = {
    "v": (schedules.trigonometric(), "v"),
    "eps": (None, "eps"),
    "eps_quant": (None, "eps"),
    "v_discrete": (None, "v"),
    "karras": (schedules.edm(), "edm"),
    "simple": (schedules.edm(), "edm"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper(name: str) -> None:
    known, predicts = WRAPPERS[name]
    schedule, network = known or table(), Analytic(name)
    sigma = CASE.input("sigma")
    times = schedule.time_at(-2 * sigma.log())
    shape = (-1, 1, 1, 1)
    a = schedule.alpha(times).reshape(shape)
    # Their x is ours divided by a: x_0 + σ ε.
    prediction = NetworkDenoiser(network, schedule, predicts)(a * CASE.input("x"), times, Condition())
    # The original computes in float32: σ up to 12 multiplies what the network tells.
    torch.testing.assert_close(prediction.x0, CASE.output(f"{name}.denoised"), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(network.shown, CASE.output(f"{name}.model_x"), rtol=1e-5, atol=1e-5)
    # Times come out of float32 logarithms, timesteps out of a search among a thousand of them.
    told = CASE.output(f"{name}.model_t").double()
    torch.testing.assert_close(network.told, told, rtol=1e-5, atol=1e-3 if known is None else 1e-6)


@pytest.mark.parametrize("name", ["v", "eps", "eps_quant", "v_discrete", "karras"])
def test_loss(name: str) -> None:
    known, predicts = WRAPPERS[name]
    schedule = known or table()
    objective = DiffusionObjective(Analytic(name), schedule, predicts)
    times = schedule.time_at(-2 * CASE.input("sigma").log())
    loss, _ = objective.losses(CASE.input("x0"), times, CASE.input("noise"), Condition())
    torch.testing.assert_close(loss, CASE.output(f"{name}.loss"), rtol=1e-5, atol=1e-5)


def test_times_to_levels_and_back() -> None:
    schedule = table()

    def ratio(times: Tensor) -> Tensor:
        return (-schedule.log_snr(times) / 2).exp()

    # The original interpolates a float32 table of logarithms up to 2.7, and exponentiates.
    near = 5e-6
    torch.testing.assert_close(ratio(CASE.input("t_frac") + 1), CASE.output("eps.t_to_sigma"), rtol=near, atol=0)
    ends = ratio(torch.tensor([1.0, 1000.0]))
    torch.testing.assert_close(ends, CASE.output("eps.sigma_min_max"), rtol=near, atol=0)
    evenly = ratio(torch.linspace(1000, 1, CASE.config["n_sigmas"], dtype=torch.float64))
    torch.testing.assert_close(evenly, CASE.output("eps.get_sigmas")[:-1], rtol=near, atol=0)
    back = schedule.time_at(-2 * CASE.output("eps.t_to_sigma").log())
    torch.testing.assert_close(back, CASE.input("t_frac") + 1, rtol=0, atol=2e-3)
    unit, continuous = CASE.input("t_unit"), schedules.trigonometric()
    sigma = continuous.sigma(unit) / continuous.alpha(unit)
    torch.testing.assert_close(sigma, CASE.output("v.t_to_sigma"), rtol=near, atol=0)
