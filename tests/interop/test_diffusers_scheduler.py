"""Schedules of diffusers' schedulers against diffusers itself, in and out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carrara.interop import diffusers_scheduler
from carrara.process import schedules
from carrara.process.schedules import Discrete
from tests.errors import refused

CONFIGS: dict[str, dict[str, Any]] = {
    "DDPM": {},
    "unscaled betas of fewer steps": {"num_train_timesteps": 100},
    "Stable Diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "sigmoid": {"beta_schedule": "sigmoid", "prediction_type": "sample"},
    "trained betas": {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
SCHEDULES = (
    schedules.linear(1000),
    schedules.linear(50),
    schedules.cosine(40),
    schedules.scaled_linear(30),
    schedules.sigmoid(20),
    schedules.from_betas([0.1, 0.2, 0.4]),
    schedules.zero_terminal_snr(schedules.scaled_linear(60)),
)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_table_is_diffusers_own(config: dict[str, Any]) -> None:
    from diffusers import DDPMScheduler

    peer: Any = DDPMScheduler(**config)
    found, predicts = diffusers_scheduler.read(dict(peer.config) | {"_class_name": "DDPMScheduler"})
    # Theirs is a product of up to a thousand factors in float32.
    torch.testing.assert_close(found.alphas_cumprod.float(), peer.alphas_cumprod, rtol=2e-4, atol=2e-7)
    assert diffusers_scheduler.PREDICTS[peer.config.prediction_type] == predicts


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_comes_back_from_the_config_that_diffusers_takes(schedule: Discrete) -> None:
    import diffusers

    written = diffusers_scheduler.config(schedule, "v", pixels=False, learned_variance=False)
    peer: Any = getattr(diffusers, written["_class_name"]).from_config(written)
    torch.testing.assert_close(peer.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=2e-4, atol=2e-7)
    again, predicts = diffusers_scheduler.read(written)
    assert predicts == "v"
    # To the last bits where the betas themselves are stored.
    torch.testing.assert_close(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-12, atol=1e-15)
    if schedule.spec["kind"] != "sigmoid":
        assert again.spec == schedule.spec


def test_a_learned_variance_asks_for_the_scheduler_that_can_use_it() -> None:
    written = diffusers_scheduler.config(schedules.cosine(40), "eps", pixels=False, learned_variance=True)
    assert written["_class_name"] == "DDPMScheduler"
    assert written["variance_type"] == "learned_range"


def test_what_cannot_be_expressed_is_refused() -> None:
    for config, key in (
        ({"_class_name": "KarrasVeScheduler"}, "_class_name"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "scaled"}, "beta_schedule"),
    ):
        with refused("unsupported", key=key):
            diffusers_scheduler.read(config)
    with refused("unsupported", key="schedule"):
        diffusers_scheduler.config(schedules.rectified_flow(), "v", pixels=True, learned_variance=False)
