"""Checkpoints of the diffusion transformer in its authors' layout, and diffusers' network as an oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.interop import dit
from carrara.networks import DiT, DiTParams
from tests.errors import refused
from tests.networks.test_unet import awake, noise

PARAMS = DiTParams(
    image_size=(8, 8), in_channels=4, width=32, depth=2, heads=4, num_classes=5, null_label=True, learned_variance=True
)


def checkpoint() -> dict[str, Tensor]:
    return dit.state_dict(awake(DiT(PARAMS)))


def test_the_layout_goes_there_and_back() -> None:
    network = awake(DiT(PARAMS))
    theirs = dit.state_dict(network)
    again = dit.load(theirs, heads=4)
    assert again.params == PARAMS
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert {
        *("x_embedder.proj.weight", "t_embedder.mlp.0.bias", "y_embedder.embedding_table.weight", "pos_embed"),
        *("blocks.1.attn.qkv.weight", "blocks.1.attn.proj.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias"),
        *("blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias", "final_layer.linear.weight"),
    } <= theirs.keys()
    assert len(theirs) == len(network.state_dict()) + 1


def test_predictions_are_those_of_diffusers() -> None:
    from diffusers import DiTTransformer2DModel

    peer: Any = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, attention_bias=True, norm_eps=1e-6,
    ).eval()  # fmt: skip
    theirs, loaded = checkpoint(), {}
    for key, value in theirs.items():
        if key.startswith("x_embedder"):
            loaded[key.replace("x_embedder", "pos_embed")] = value
        elif key.startswith("final_layer.linear"):
            loaded[key.replace("final_layer.linear", "proj_out_2")] = value
        elif key.startswith("final_layer"):
            loaded[key.replace("final_layer.adaLN_modulation.1", "proj_out_1")] = value
    for i in range(2):
        mine, block = f"blocks.{i}", f"transformer_blocks.{i}"
        for kind in ("weight", "bias"):
            parts = theirs[f"{mine}.attn.qkv.{kind}"].chunk(3)
            loaded |= {f"{block}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
            loaded[f"{block}.attn1.to_out.0.{kind}"] = theirs[f"{mine}.attn.proj.{kind}"]
            loaded[f"{block}.ff.net.0.proj.{kind}"] = theirs[f"{mine}.mlp.fc1.{kind}"]
            loaded[f"{block}.ff.net.2.{kind}"] = theirs[f"{mine}.mlp.fc2.{kind}"]
            loaded[f"{block}.norm1.linear.{kind}"] = theirs[f"{mine}.adaLN_modulation.1.{kind}"]
            for a, b in ((0, 1), (2, 2)):
                loaded[f"{block}.norm1.emb.timestep_embedder.linear_{b}.{kind}"] = theirs[f"t_embedder.mlp.{a}.{kind}"]
        loaded[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = theirs["y_embedder.embedding_table.weight"]
        peer.transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0  # as the authors' program has it
    missing = peer.load_state_dict(loaded, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"pos_embed.pos_embed"}
    x, time, label = noise(3, 4, 8, 8), torch.tensor([0, 37, 999]), torch.tensor([4, 5, 2])
    with torch.no_grad():
        ours = dit.load(theirs, heads=4)(x, time.float(), Condition(label=label))
        torch.testing.assert_close(
            ours, peer(x, time, label).sample, rtol=0, atol=1e-5 * float(ours.abs().max()) + 1e-5
        )


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    whole = checkpoint()
    with refused("missing", "heads"):
        dit.load(whole)
    for key in ("pos_embed", "blocks.1.attn.proj.bias", "x_embedder.proj.weight"):
        with refused("missing", key):
            dit.load({name: value for name, value in whole.items() if name != key}, heads=4)
    with refused("unknown", "ema"):
        dit.load({**whole, "ema": torch.zeros(1)}, heads=4)
    with refused("shape", "blocks.0.mlp.fc2.bias"):
        dit.load({**whole, "blocks.0.mlp.fc2.bias": torch.zeros(3)}, heads=4)
    with refused("unsupported", "pos_embed"):
        dit.load({**whole, "pos_embed": whole["pos_embed"] + 0.1}, heads=4)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"context_channels": 3}, "context_channels"),
        ({"vector_channels": 3}, "vector_channels"),
        ({"concat_channels": 3}, "concat_channels"),
        ({"num_classes": None, "null_label": False}, "num_classes"),
        ({"image_size": (8, 4)}, "image_size"),
    ],
)
def test_networks_that_the_layout_cannot_hold_are_refused(changes: dict[str, Any], key: str) -> None:
    with refused("unsupported", f"network.{key}"):
        dit.state_dict(DiT(replace(PARAMS, **changes)))
