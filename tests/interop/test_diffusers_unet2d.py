"""Folders of diffusers' `UNet2DModel` against diffusers itself with random weights, both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.condition import Condition
from carrara.errors import Code
from carrara.interop import diffusers_unet2d
from carrara.networks import UNet, UNetParams
from tests.errors import refused
from tests.interop.test_guided_diffusion import close, noise, redraw

BASE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "DDPM": {},
    "one head": {"attention_head_dim": None},
    "classes": {"num_class_embeds": 5},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "learned variance": {"out_channels": 6},
    "channels in and out": {"in_channels": 4, "out_channels": 3},
    "residual": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (32, 48, 64),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "uneven widths": {"block_out_channels": (32, 48), "layers_per_block": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_folder_gives_the_same_answers_here_and_there(options: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    theirs = UNet2DModel(**BASE | options)
    theirs.load_state_dict(redraw(theirs.state_dict()))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = diffusers_unet2d.load_unet(tmp_path / "theirs")
    diffusers_unet2d.save_unet(ours, tmp_path / "ours")
    again, info = UNet2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in again.state_dict().items())
    x, t = noise(2, ours.params.in_channels, 8, 8), torch.tensor([3, 731])
    label = torch.tensor([1, 4]) if ours.params.labels else None
    with torch.no_grad():
        expected = again.eval()(x, t, class_labels=label).sample
        close(ours(x, t, Condition(label=label)), expected)
    assert diffusers_unet2d.load_unet(tmp_path / "ours").params == ours.params


def test_heads_of_the_legacy_order_are_sorted_on_the_way_out() -> None:
    """The same answers from a copy; the network itself stays what it is."""
    from diffusers import UNet2DModel

    params = UNetParams(
        image_size=(8, 8), channels=32, channel_mult=(1, 2), attention=(2,), heads=None, head_channels=16
    )
    params = replace(params, qkv_order="legacy", resampling="convolution", adaptive_norm=False)
    torch.manual_seed(0)
    network = UNet(params)
    network.load_state_dict(redraw(network.state_dict()))
    peer = UNet2DModel(**{k: v for k, v in diffusers_unet2d.config(params).items() if k[0] != "_"}).eval()
    peer.load_state_dict(diffusers_unet2d.unet_state_dict(network))
    x, t = noise(2, 3, 8, 8), torch.tensor([3, 731])
    with torch.no_grad():
        close(network.eval()(x, t), peer(x, t).sample)
    assert network.params.qkv_order == "legacy"


def test_what_our_network_does_not_have_is_refused_by_its_entry(tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], Code, str], ...] = (
        ({"freq_shift": 1}, "unsupported", "freq_shift"),  # Google's DDPM checkpoints
        ({"downsample_padding": 0}, "unsupported", "downsample_padding"),
        ({"colour": 3}, "unknown", "colour"),
        ({"_class_name": "UNet1DModel"}, "unsupported", "_class_name"),
        ({"down_block_types": ("CrossAttnDownBlock2D",) * 2}, "unsupported", "down_block_types"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "mismatch", "up_block_types"),
        ({"downsample_type": "resnet", "down_block_types": ("AttnDownBlock2D",) * 2}, "mismatch", "up_block_types"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}, "unsupported", "down_block_types"),
        ({"resnet_time_scale_shift": "scale_shift"}, "unsupported", "attn_norm_num_groups"),
        ({"resnet_time_scale_shift": "spatial"}, "unsupported", "resnet_time_scale_shift"),
    )
    for changes, code, key in cases:
        with refused(code, key=key):
            diffusers_unet2d.unet_params(BASE | changes)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with refused("missing", key=str(tmp_path / "diffusion_pytorch_model.safetensors")):
        diffusers_unet2d.load_unet(tmp_path)
    for params, key in (
        (UNetParams(resampling="pooling"), "network.resampling"),
        (UNetParams(heads=2, channel_mult=(1, 2, 4)), "network.heads"),
        (UNetParams(concat_channels=3), "network.concat_channels"),
        (UNetParams(transformer_depth=1), "network.transformer_depth"),
    ):
        with refused("unsupported", key=key):
            diffusers_unet2d.config(params)
