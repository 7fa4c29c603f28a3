"""Latent diffusion's U-Net and its spatial transformer against stored outputs of the original program."""

from __future__ import annotations

import torch

from carrara.condition import Condition
from carrara.interop import compvis_unet
from carrara.interop.unet_keys import TRANSFORMER_BLOCK
from carrara.networks.transformer import SpatialTransformer
from tests.parity.test_guided_diffusion_networks import check, read


def test_unet() -> None:
    weights, tensors, spec = read("d1_ldm_unet_crossattn")
    network = compvis_unet.load_unet(weights, **spec["config"]["kwargs"]).eval()
    with torch.no_grad():
        out = network(tensors["input.x"], tensors["input.t"], Condition(context=tensors["input.context"]))
    check("out", out, tensors, spec)


def test_spatial_transformer() -> None:
    weights, tensors, spec = read("d4_spatial_transformer")
    a = spec["config"]["kwargs"]
    layer = SpatialTransformer("here", a["in_channels"], a["context_dim"], a["n_heads"], depth=a["depth"])
    ours = {"norm": "norm", "project_in": "proj_in", "project_out": "proj_out"}
    ours |= {f"blocks.0.{mine}": f"transformer_blocks.0.{theirs}" for mine, theirs in TRANSFORMER_BLOCK.items()}
    own = layer.state_dict()
    for key in own:
        module, _, name = key.rpartition(".")
        own[key] = weights[f"{ours[module]}.{name}"].reshape(own[key].shape)
    layer.load_state_dict(own)
    with torch.no_grad():
        out = layer(tensors["input.x"], Condition(context=tensors["input.context"]))
    check("out", out, tensors, spec)
