"""Power-function means, and means of other widths made from them after the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from carrara.errors import UserError
from carrara.training.ema import EMA, PowerFunction
from carrara.training.posthoc import Profile, coefficients, reweighted
from tests.runs import tiny_recipe, train


@given(st.floats(0.01, 0.27))
def test_gamma_gives_the_width_back(sigma_rel: float) -> None:
    """σ_rel is the standard deviation of τ/t under the density (γ + 1)(τ/t)^γ (EDM2, §3.1)."""
    gamma = PowerFunction(sigma_rel).gamma
    mean, second = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    # second - mean² cancels to 1e-4 of its terms for the narrowest widths
    assert np.sqrt(second - mean**2) == pytest.approx(sigma_rel, rel=1e-6)


def test_the_mean_follows_its_profile() -> None:
    """Weights that are τ in step τ: the mean is Σ τ·∫ over step τ of the profile."""
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, PowerFunction(0.1))
    gamma = PowerFunction(0.1).gamma
    total = 50
    for step in range(1, total + 1):
        nn.init.constant_(module.weight, float(step))
        ema.update(module, step)
    edges = np.arange(total + 1.0) / total
    shares = np.diff(edges ** (gamma + 1))
    expected = float((shares * np.arange(1, total + 1)).sum())
    # float32: each of 50 updates rounds by 2e-6 at most, half a unit in the last place at 50
    assert float(next(ema.module.parameters())) == pytest.approx(expected, abs=1e-4)


@given(st.floats(0, 20), st.floats(0, 20), st.floats(0.1, 1))
def test_the_product_of_profiles_is_the_integral(gamma: float, other: float, share: float) -> None:
    early, late = Profile(gamma, share), Profile(other, 1.0)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    tau = (nodes + 1) / 2 * share
    product = (gamma + 1) * tau**gamma / share ** (gamma + 1) * (other + 1) * tau**other
    integral = float((weights * product).sum() * share / 2)
    # Gauss-Legendre of 60 nodes has a relative error of 1e-5 where the exponents are small and not whole
    assert early.dot(late) == pytest.approx(integral, rel=1e-4)
    assert late.dot(early) == early.dot(late)


def test_a_stored_profile_is_found_again_exactly() -> None:
    stored = [Profile(PowerFunction(width).gamma, step) for step in (100, 200, 300) for width in (0.05, 0.1)]
    for index, profile in enumerate(stored):
        expected = np.eye(len(stored))[index]
        assert coefficients(stored, profile) == pytest.approx(expected, abs=1e-6)  # condition number about 1e6


def test_a_width_between_comes_near_its_own_mean() -> None:
    """Weights on a random walk: the mean made afterwards is near the one that was never stored."""
    draw = torch.Generator().manual_seed(0)
    module = nn.Linear(8, 8, bias=False)
    widths = {width: EMA(module, PowerFunction(width)) for width in (0.05, 0.1, 0.07)}
    stored, profiles = [], []
    with torch.no_grad():
        for step in range(1, 401):
            module.weight += torch.randn(8, 8, generator=draw) * 0.1
            for mean in widths.values():
                mean.update(module, step)
            if step % 25 == 0:
                for width in (0.05, 0.1):
                    stored.append(next(widths[width].module.parameters()).clone())
                    profiles.append(Profile(PowerFunction(width).gamma, step))
        shares = coefficients(profiles, Profile(PowerFunction(0.07).gamma, 400))
        made = torch.einsum("n,nij->ij", torch.from_numpy(shares).float(), torch.stack(stored))
        wanted = next(widths[0.07].module.parameters())
        nearest_stored = min(float((m - wanted).norm()) for m in stored)
    # Measured: 0.3 % of the way; what matters is that no stored mean is anywhere as near.
    assert float((made - wanted).norm()) < 0.05 * nearest_stored


def test_a_run_stores_snapshots_and_makes_models_of_them(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "training.steps=8",
        "training.ema=[0.9, 0.99]",
        "training.power_ema=[0.05, 0.1]",
        "training.power_ema_every=2",
        "training.keep_every=5",
        "training.keep_checkpoints=1",
    )
    train(recipe, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000008"]
    names = {p.name for p in (tmp_path / "checkpoints" / "step-00000008").iterdir()}
    assert names >= {"ema.safetensors", "ema-0.99.safetensors", "power-0.05.safetensors", "power-0.1.safetensors"}
    assert len(list((tmp_path / "snapshots").iterdir())) == 4
    assert (tmp_path / "model-ema-0.99" / "config.json").exists()
    model = reweighted(tmp_path, 0.1)
    stored = torch.cat([p.flatten() for p in reweighted(tmp_path, 0.1).network.state_dict().values()])
    from safetensors.torch import load_file

    own = load_file(tmp_path / "snapshots" / "step-00000008" / "power-0.1.safetensors")
    # exact but for the solution of the normal equations, of condition number 1e6 in float64
    torch.testing.assert_close(
        stored, torch.cat([own[k].flatten() for k in model.network.state_dict()]), atol=1e-6, rtol=0
    )
    assert "0.1 at step 8" in model.origin
    with pytest.raises(UserError, match="stored no means up to step 1"):
        reweighted(tmp_path, 0.1, step=1)


def test_a_run_without_snapshots_says_what_is_missing(tiny_run: Path) -> None:
    with pytest.raises(UserError, match=r"training\.power_ema"):
        reweighted(tiny_run, 0.1)
