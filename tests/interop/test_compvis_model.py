"""The schedule of a latent diffusion checkpoint: its formula read from its table, and the table written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carrara.interop import compvis_model, compvis_unet, heads
from carrara.networks import UNet, UNetParams
from carrara.process import schedules
from carrara.process.schedules import Discrete
from tests.errors import refused


def stored(schedule: Discrete) -> dict[str, torch.Tensor]:
    """β as the originals keep it."""
    return {"betas": schedule.betas.float()}


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 400), st.integers(1, 50), st.integers(51, 400))
def test_the_formula_is_found_in_its_float32_table(steps: int, start: int, end: int) -> None:
    made = schedules.scaled_linear(steps, start / 10_000, end / 10_000)
    assert compvis_model.schedule(stored(made), {}).spec == made.spec


@pytest.mark.parametrize("made", [schedules.cosine(50), schedules.linear(1000), schedules.linear(60)], ids=repr)
def test_other_formulas_are_found_too(made: Discrete) -> None:
    assert compvis_model.schedule(stored(made), {}).spec == made.spec


def test_a_table_of_no_formula_stays_a_table() -> None:
    betas = torch.tensor([0.1, 0.3, 0.2])
    found = compvis_model.schedule({"betas": betas}, {})
    assert found.spec["kind"] == "from_betas"
    torch.testing.assert_close(found.betas.float(), betas)


def test_the_arguments_say_it_where_there_is_no_table() -> None:
    def told(**arguments: Any) -> dict[str, object]:
        return compvis_model.schedule({}, arguments).spec

    # Their "linear" is linear in √β, their "sqrt_linear" in β.
    assert told(linear_start=0.0015, linear_end=0.0195)["kind"] == "scaled_linear"
    assert told(beta_schedule="sqrt_linear", linear_start=1e-4, linear_end=0.02) == {"kind": "linear", "steps": 1000}
    assert told(beta_schedule="sqrt_linear", linear_start=1e-3, linear_end=0.02)["kind"] == "from_betas"
    assert told(beta_schedule="cosine", timesteps=40) == {"kind": "cosine", "steps": 40}
    with refused("missing", key="betas"):
        compvis_model.schedule({}, {})
    with refused("mismatch", key="betas"):
        compvis_model.schedule(stored(schedules.cosine(40)), {"linear_start": 0.0015, "linear_end": 0.0195})


def test_the_buffers_are_the_posterior_of_the_process() -> None:
    """Ho et al. 2020, eq. 7: without noise the posterior's mean of x_t = √ᾱ_t·x_0 is √ᾱ_{t-1}·x_0; and the precision
    of q(x_{t-1}|x_t, x_0) is the sum of those of its two sources."""
    made = schedules.scaled_linear(100, 0.0015, 0.0195)
    t = {name: value.double() for name, value in compvis_model.tables(made).items()}
    mean = t["posterior_mean_coef1"] + t["posterior_mean_coef2"] * t["sqrt_alphas_cumprod"]
    before = t["alphas_cumprod_prev"]
    torch.testing.assert_close(mean, before.sqrt(), rtol=1e-6, atol=0)  # of numbers kept in float32
    precision = (1 - t["betas"][1:]) / t["betas"][1:] + 1 / (1 - before[1:])
    torch.testing.assert_close(t["posterior_variance"][1:], 1 / precision, rtol=1e-4, atol=0)  # 1 - ᾱ cancels at t = 2
    assert float(t["posterior_variance"][0]) == 0
    assert len(t) == 12
    assert {value.dtype for value in compvis_model.tables(made).values()} == {torch.float32}


def test_a_class_embedder_lies_beside_the_u_net() -> None:
    params = UNetParams(
        channels=32, num_classes=4, label_tokens=1, transformer_depth=1, context_channels=8, head_channels=16
    )
    network = UNet(params)
    weights, table = compvis_model.weights(network)
    assert network.label is not None
    assert table is not None
    assert torch.equal(table, network.label.weight)
    assert not any("label" in key for key in weights)
    again = compvis_unet.load_unet(
        {compvis_unet.PART + key: value for key, value in weights.items()} | {compvis_unet.CLASSES: table},
        class_tokens=True,
        **compvis_unet.constructor_arguments(compvis_model.without_classes(params)),
    )
    assert again.state_dict().keys() == network.state_dict().keys()


def test_heads_that_the_rule_chose_are_named() -> None:
    """The rule gives 128 channels heads of 64; at 32 and 64 channels heads have no width in common."""
    chosen = UNetParams(channels=64, channel_mult=(1, 2), attention=(2,))
    assert heads.with_width(chosen).head_channels == 64
    varying = UNetParams(channels=32, channel_mult=(1, 1, 2), attention=(2, 4))
    assert heads.with_width(varying) == varying
    said = UNetParams(channels=64, heads=2, channel_mult=(1, 2), attention=(2,))
    assert heads.with_width(said) is said
    with refused("unsupported", key="network.heads"):
        compvis_unet.constructor_arguments(varying)
