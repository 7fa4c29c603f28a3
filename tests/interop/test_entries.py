"""Configs with null, text or impossible numbers where numbers are expected, in every layout."""

from __future__ import annotations

from typing import Any

import pytest

from carrara.interop import compvis, diffusers_codec, diffusers_scheduler, diffusers_unet, diffusers_unet2d
from carrara.interop import guided_diffusion as adm
from tests.errors import refused

SHAPE = {"ch": 32, "num_res_blocks": 1, "in_channels": 3, "resolution": 16, "z_channels": 3, "ch_mult": (1, 2)}
UNET = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}


@pytest.mark.parametrize("value", [None, "32", "a", float("nan"), True, [None]])
@pytest.mark.parametrize("key", ["num_train_timesteps", "beta_start", "beta_end"])
def test_schedulers(key: str, value: Any) -> None:
    with refused("invalid", key=key):
        diffusers_scheduler.read({"_class_name": "DDIMScheduler", key: value})


@pytest.mark.parametrize("value", ["a", 0.1, [], [None], [0.1, "b"], [0.1, float("inf")]])
def test_trained_betas(value: Any) -> None:
    with refused("invalid", key="trained_betas"):
        diffusers_scheduler.read({"_class_name": "DDIMScheduler", "trained_betas": value})


@pytest.mark.parametrize("value", ["32", 0, -1, 2.5, True])
@pytest.mark.parametrize("key", ["norm_num_groups", "in_channels", "layers_per_block", "block_out_channels"])
def test_networks_of_diffusers(key: str, value: Any) -> None:
    for read in (diffusers_unet.unet_params, diffusers_unet2d.unet_params):
        with refused("invalid", key=key):
            read({key: value})
    with refused("invalid", key=key):
        diffusers_codec.from_state_dict({}, vq=False, **{key: value})


@pytest.mark.parametrize("key", ["norm_num_groups", "in_channels", "down_block_types", "dropout"])
def test_null_in_networks_of_diffusers(key: str) -> None:
    for read in (diffusers_unet.unet_params, diffusers_unet2d.unet_params):
        with refused("invalid", key=key):
            read({key: None})


@pytest.mark.parametrize(
    ("key", "value"),
    [("latents_std", [1.0, 0]), ("latents_mean", [None]), ("scaling_factor", "a"), ("scaling_factor", 0)],
)
def test_latent_scales(key: str, value: Any) -> None:
    with refused("invalid", key=key):
        diffusers_codec.from_state_dict({}, vq=False, **{key: value})


@pytest.mark.parametrize("value", [None, "32", 0, [1]])
@pytest.mark.parametrize("key", ["ch", "num_res_blocks", "resolution", "z_channels"])
def test_first_stages_of_compvis(key: str, value: Any) -> None:
    with refused("invalid", key=key):
        compvis.untrained(embed_dim=3, ddconfig={**SHAPE, key: value})
    with refused("invalid", key="embed_dim"):
        compvis.untrained(embed_dim=value, ddconfig=SHAPE)
    with refused("invalid", key="ddconfig"):
        compvis.untrained(embed_dim=3, ddconfig=value)


@pytest.mark.parametrize("value", [None, "32", 0, [1]])
@pytest.mark.parametrize("key", ["in_channels", "model_channels", "out_channels", "dims"])
def test_networks_of_openai(key: str, value: Any) -> None:
    with refused("invalid", key=key):
        adm.unet_params(**{**UNET, key: value})
