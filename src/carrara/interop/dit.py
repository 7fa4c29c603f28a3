"""Checkpoints of the diffusion transformer in the layout of its authors (Peebles & Xie 2023).

Pure maps between state dicts. Its `pos_embed` is a constant, which the network here computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.interop import layout
from carrara.interop.layout import Place, Table, check_expressible, to_ours, to_theirs
from carrara.networks.dit import PUBLISHED, DiT, DiTBlock, DiTParams, position_embedding

StateDict = Mapping[str, Tensor]

TABLE: Table = {
    DiT: {
        "patches": "x_embedder.proj",
        "time.hidden": "t_embedder.mlp.0",
        "time.out": "t_embedder.mlp.2",
        "label": "y_embedder.embedding_table",
        "blocks.{i}": "blocks.{i}",
        "modulation": "final_layer.adaLN_modulation.1",
        "out": "final_layer.linear",
    },
    DiTBlock: {
        "modulation": "adaLN_modulation.1",
        "qkv": "attn.qkv",
        "attention_out": "attn.proj",
        "hidden": "mlp.fc1",
        "out": "mlp.fc2",
    },
}
POSITIONS = "pos_embed"


def params_of(state_dict: StateDict, *, heads: int | None = None, **changes: Any) -> DiTParams:
    """The params that a checkpoint's shapes imply.

    Args:
        heads: attention heads, which no shape shows; None takes those of the published shape of this width.
        changes: fields of `DiTParams` to set otherwise, `null_label=False` for a table without a row for "no class".

    Raises:
        UserError: a key is missing, or the heads are neither given nor known.
    """
    width, in_channels, patch, _ = _of(state_dict, "x_embedder.proj.weight").shape
    depth = len({key.split(".")[1] for key in state_dict if key.startswith("blocks.")})
    if heads is None:
        known = {shape["width"]: shape["heads"] for shape in PUBLISHED.values()}
        if width not in known:
            raise UserError(
                f"no published shape is {width} wide: give the number of attention heads.", key="heads", code="missing"
            )
        heads = known[width]
    null = bool(changes.get("null_label", True))
    rows = len(_of(state_dict, "y_embedder.embedding_table.weight"))
    raw = len(_of(state_dict, "final_layer.linear.weight")) // patch**2
    side = round(_of(state_dict, POSITIONS).shape[-2] ** 0.5) * patch
    implied: dict[str, Any] = {
        "image_size": (side, side),
        "in_channels": in_channels,
        "learned_variance": raw == 2 * in_channels,
        "num_classes": rows - null,
        "null_label": null,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": len(_of(state_dict, "blocks.0.mlp.fc1.weight")) / width,
    }
    return DiTParams(**{**implied, **changes})


def load(state_dict: StateDict, *, heads: int | None = None, **changes: Any) -> DiT:
    """A network from a checkpoint.

    Args:
        heads, changes: see `params_of`.

    Raises:
        UserError: a key is missing, unexpected or misshapen, or the positions are others than the network's.
    """
    params = params_of(state_dict, heads=heads, **changes)
    network = DiT(params)
    own = {key: value for key, value in state_dict.items() if key != POSITIONS}
    network.load_state_dict(to_ours(own, network, places(network)))
    positions, expected = _of(state_dict, POSITIONS).float(), _table(params)[None]
    if positions.shape != expected.shape or not torch.allclose(positions, expected, atol=1e-4):
        raise UserError(
            "the checkpoint's pos_embed is not the sinusoidal one that this network computes.",
            key=POSITIONS,
            code="unsupported",
        )
    return network.eval()


def state_dict(network: DiT) -> dict[str, Tensor]:
    """The network's weights in the authors' layout, `pos_embed` included.

    Raises:
        UserError: the network has something that the layout has not.
    """
    p = network.params
    extra = next((name for name in ("context_channels", "vector_channels", "concat_channels") if getattr(p, name)), "")
    check_expressible(
        "the authors' DiT",
        (
            (f"network.{extra}", bool(extra), f"network.{extra}"),
            ("network.num_classes", not p.labels, "model without classes"),
            ("network.image_size", p.image_size[0] != p.image_size[1], "model of images that are not square"),
        ),
    )
    return to_theirs(network, places(network)) | {POSITIONS: _table(p)[None]}


def places(network: DiT) -> Iterator[Place]:
    """Where every tensor lies in the authors' checkpoints."""
    return layout.places(network, TABLE)


def _table(params: DiTParams) -> Tensor:
    return position_embedding(params.width, *(side // params.patch_size for side in params.image_size))


def _of(state_dict: StateDict, key: str) -> Tensor:
    if key not in state_dict:
        raise UserError(f"the checkpoint lacks the weights '{key}'.", key=key, code="missing")
    return state_dict[key]
