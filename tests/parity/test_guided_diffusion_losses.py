"""The training losses of guided-diffusion, term by term, from the stored reference runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.objectives import DiffusionObjective, Loss
from carrara.process import Chain
from tests.parity.reference import GUIDED_DIFFUSION_CASES, GuidedDiffusion


class Analytic(nn.Module):
    """The stored run's analytic network, as a module."""

    def __init__(self, case: GuidedDiffusion) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.case.network(x, time, condition)


LEARNED = [name for name in GUIDED_DIFFUSION_CASES if "learned" in name]
FIXED = [name for name in GUIDED_DIFFUSION_CASES if "learned" not in name]


def losses(case: GuidedDiffusion, loss: Loss, vlb_weight: float = 1e-3) -> tuple[Tensor, dict[str, Tensor]]:
    chain = Chain(case.schedule, case.grid, case.variance, levels=256, cdf="tanh")
    objective = DiffusionObjective(
        Analytic(case),
        case.schedule,
        case.denoiser.predicts,
        loss=loss,
        learned_variance=case.learned and loss != "simple",
        chain=chain,
        vlb_weight=vlb_weight,
    )
    times = case.grid.times[case.pair_index(case.input("t"))]
    return objective.losses(case.input("x_start"), times, case.input("noise"), Condition())


@pytest.mark.parametrize("name", FIXED)
def test_squared_error(name: str) -> None:
    case = GuidedDiffusion(name)
    loss, scalars = losses(case, "simple")
    case.check("training_losses.mse", scalars["mse"])
    case.check("training_losses.loss", loss)


@pytest.mark.parametrize("name", LEARNED)
def test_hybrid(name: str) -> None:
    case = GuidedDiffusion(name)
    # RESCALED_MSE adds T/1000 of the bound's term, that is λ = 0.001.
    loss, scalars = losses(case, "hybrid")
    steps = len(case.grid)
    case.check("training_losses_RESCALED_MSE.mse", scalars["mse"])
    case.check("training_losses_RESCALED_MSE.vb", scalars["vb"] * steps / 1000)
    case.check("training_losses_RESCALED_MSE.loss", loss)
    # MSE adds it unscaled, that is λ = 1/T.
    loss, scalars = losses(case, "hybrid", vlb_weight=1 / steps)
    case.check("training_losses_MSE.vb", scalars["vb"])
    case.check("training_losses_MSE.loss", loss)


@pytest.mark.parametrize("name", LEARNED)
def test_bound(name: str) -> None:
    case = GuidedDiffusion(name)
    loss, _ = losses(case, "vlb")
    case.check("training_losses_RESCALED_KL.loss", loss)
    case.check("training_losses_KL.loss", loss / len(case.grid))


def test_the_hybrid_teaches_the_bound_to_the_variance_alone() -> None:
    case = GuidedDiffusion("c2_linear_learnedrange_25")
    x = case.input("x_start")
    mean = torch.zeros_like(x, requires_grad=True)
    variance = torch.zeros_like(x, requires_grad=True)

    class Told(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            return torch.cat([mean, variance], dim=1)

    chain = Chain(case.schedule, case.grid)
    objective = DiffusionObjective(Told(), case.schedule, loss="hybrid", learned_variance=True, chain=chain)
    times = case.grid.times[case.pair_index(case.input("t"))]
    loss, scalars = objective.losses(x, times, case.input("noise"), Condition())
    of_mean, of_variance = torch.autograd.grad(loss.sum(), [mean, variance])
    # d/dm of mean((ε - m)²) at m = 0, and nothing of the bound's.
    dimensions = x[0].numel()
    torch.testing.assert_close(of_mean, -2 * case.input("noise") / dimensions)
    assert bool((of_variance.abs().sum((1, 2, 3)) > 0).all())
    assert scalars["vb"].shape == (len(x),)
