"""Folders of diffusers' U-Nets against diffusers itself with random weights, both directions, and bad folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import Code
from carrara.interop import diffusers_unet
from carrara.interop.compvis_unet import unet_params
from carrara.networks import UNet, UNetParams
from carrara.presets.compvis_published import PUBLISHED
from tests.errors import refused
from tests.interop.test_guided_diffusion import close, noise, redraw

BASE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
EVERYWHERE: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {},
    "Stable Diffusion 2": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "channels in and out": {"in_channels": 9, "out_channels": 8},
    "depths and layers": EVERYWHERE | {"transformer_layers_per_block": (1, 2, 3), "layers_per_block": (2, 1, 3)},
    "up-sampler": EVERYWHERE | {"only_cross_attention": (True, False, True), "num_class_embeds": 6},
    "only the context": {"only_cross_attention": True},
    "image embedding": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "linear embedding": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 10},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "norm_num_groups": 32},
    "dropout": {"dropout": 0.3},
    "uneven widths": {"block_out_channels": (48, 64), "attention_head_dim": 2},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def diffusers_network(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(**config)
    network.load_state_dict(redraw(network.state_dict()))
    return network.eval()


def told(params: UNetParams) -> Condition:
    return Condition(
        label=torch.tensor([1, 4]) if params.labels else None,
        vector=noise(2, params.vector_channels) if params.vector_channels else None,
        context=noise(2, 7, 24),
    )


def answers(ours: UNet, theirs: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    t, condition = torch.tensor([3, 731]), told(ours.params)
    told_class = condition.label if condition.label is not None else condition.vector
    with torch.no_grad():
        expected = theirs(x, t, encoder_hidden_states=condition.context, class_labels=told_class).sample
        return ours.eval()(x, t, condition), expected


@every_option
def test_a_folder_gives_the_same_answers_here_and_there(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = diffusers_network(BASE | options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = diffusers_unet.load_unet(tmp_path / "theirs")
    x = noise(2, ours.params.in_channels, 8, 8)
    close(*answers(ours, theirs, x))

    diffusers_unet.save_unet(ours, tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    close(*answers(ours, again.eval(), x))
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in again.state_dict().items())
    assert diffusers_unet.load_unet(tmp_path / "ours").params == diffusers_unet.unet_params(
        json.loads((tmp_path / "ours" / "config.json").read_text())
    )


def test_older_weight_files_and_half_precision_are_read(tmp_path: Path) -> None:
    theirs = diffusers_network(BASE)
    theirs.half().save_pretrained(tmp_path, safe_serialization=False)
    ours = diffusers_unet.load_unet(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    close(*answers(ours, theirs.float(), noise(2, 4, 8, 8)))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("stable-diffusion")])
def test_published_models_have_every_key_of_diffusers(name: str) -> None:
    from diffusers import UNet2DConditionModel

    params = unet_params(**PUBLISHED[name])
    with torch.device("meta"):
        ours = diffusers_unet.unet_state_dict(UNet(params))
        theirs = UNet2DConditionModel(**{k: v for k, v in diffusers_unet.config(params).items() if k[0] != "_"})
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.items()} == expected


def test_configs_and_folders_that_do_not_fit_are_named_in_one_sentence(tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], Code, str], ...] = (
        ({"act_fn": "gelu"}, "unsupported", "act_fn"),
        ({"flip_sin_to_cos": False}, "unsupported", "flip_sin_to_cos"),
        ({"addition_embed_type": "text_time"}, "unsupported", "addition_embed_type"),
        ({"class_embed_type": "timestep"}, "unsupported", "class_embed_type"),
        ({"colour": 3}, "unknown", "colour"),
        ({"_class_name": "UNet2DModel"}, "unsupported", "_class_name"),
        ({"down_block_types": ("AttnDownBlock2D",) * 2}, "unsupported", "down_block_types"),
        ({"up_block_types": ("UpBlock2D",) * 2}, "mismatch", "up_block_types"),
        ({"attention_head_dim": (3, 4)}, "unsupported", "attention_head_dim"),
        ({"cross_attention_dim": (24, 32)}, "unsupported", "cross_attention_dim"),
    )
    for changes, code, key in cases:
        with refused(code, key=key):
            diffusers_unet.unet_params(BASE | changes)
    with refused("missing", key=str(tmp_path / "config.json")):
        diffusers_unet.load_unet(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refused("damaged", key=str(tmp_path / "config.json")):
        diffusers_unet.load_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with refused("missing", key=str(tmp_path / "diffusion_pytorch_model.safetensors")):
        diffusers_unet.load_unet(tmp_path)
    diffusers_network(BASE).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"cross_attention_dim": 32}))
    with refused("shape", key="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"):
        diffusers_unet.load_unet(tmp_path)


def test_channels_beside_x_come_from_the_condition(tmp_path: Path) -> None:
    theirs = diffusers_network(BASE | {"in_channels": 9})
    theirs.save_pretrained(tmp_path)
    ours = diffusers_unet.load_unet(tmp_path, concat_channels=5).eval()
    x, t, context = noise(2, 9, 8, 8), torch.tensor([3, 731]), noise(2, 7, 24)
    with torch.no_grad():
        got = ours(x[:, :4], t, Condition(context=context, concat=x[:, 4:]))
        close(got, theirs(x, t, encoder_hidden_states=context).sample)


def test_networks_that_diffusers_does_not_know_are_not_written() -> None:
    context: dict[str, Any] = {"context_channels": 8, "transformer_depth": 1, "heads": 1, "resampling": "convolution"}
    for changes, key in (
        ({}, "network.context_channels"),
        (context | {"resampling": "pooling"}, "network.resampling"),
        (context | {"up_heads": 2}, "network.up_heads"),
        (context | {"heads": None}, "network.heads"),
        (context | {"context_only_middle": True}, "network.context_only_middle"),
        (context | {"channels": 48}, "network.norm_groups"),
        (context | {"concat_channels": 3, "upsample_concat": True}, "network.upsample_concat"),
        (context | {"num_classes": 3, "vector_channels": 3}, "network.vector_channels"),
        (context | {"num_classes": 3, "label_tokens": 1}, "network.label_tokens"),
    ):
        with refused("unsupported", key=key):
            diffusers_unet.config(UNetParams(**changes))
