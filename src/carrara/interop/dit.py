"""Checkpoints of the diffusion transformer in the layout of its authors (Peebles & Xie 2023).

Pure maps between state dicts. Its `pos_embed` is a constant, which the network here computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.networks.dit import PUBLISHED, DiT, DiTParams, position_embedding

StateDict = Mapping[str, Tensor]

_PARTS = {
    "patches": "x_embedder.proj",
    "time.hidden": "t_embedder.mlp.0",
    "time.out": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "attention_out": "attn.proj",
    "hidden": "mlp.fc1",
    "out": "mlp.fc2",
}
_POSITIONS = "pos_embed"


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
    side = round(_of(state_dict, _POSITIONS).shape[-2] ** 0.5) * patch
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
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    names = dict(_names(network))
    for theirs in state_dict.keys() - names.keys() - {_POSITIONS}:
        raise UserError(f"the checkpoint holds the unexpected weights '{theirs}'.", key=theirs, code="mismatch")
    for theirs, name in names.items():
        shape = tuple(_of(state_dict, theirs).shape)
        if shape != tuple(own[name]):
            raise UserError(
                f"'{theirs}' has the shape {shape}, {tuple(own[name])} is needed.", key=theirs, code="shape"
            )
    if not torch.allclose(_of(state_dict, _POSITIONS).float().reshape(-1, params.width), _table(params), atol=1e-4):
        raise UserError(
            "the checkpoint's pos_embed is not the sinusoidal one that this network computes.",
            key=_POSITIONS,
            code="unsupported",
        )
    network.load_state_dict({name: state_dict[theirs] for theirs, name in names.items()})
    return network.eval()


def state_dict(network: DiT) -> dict[str, Tensor]:
    """The network's weights in the authors' layout, `pos_embed` included.

    Raises:
        UserError: the network takes what the layout has no place for.
    """
    params = network.params
    for name in ("context_channels", "vector_channels", "concat_channels"):
        if getattr(params, name):
            raise UserError(
                f"the authors' layout has no place for network.{name}.", key=f"network.{name}", code="unsupported"
            )
    if not params.labels or params.image_size[0] != params.image_size[1]:
        name = "image_size" if params.labels else "num_classes"
        raise UserError(
            "the authors' layout is for class-conditional models of square images.",
            key=f"network.{name}",
            code="unsupported",
        )
    own = network.state_dict()
    return {theirs: own[name] for theirs, name in _names(network)} | {_POSITIONS: _table(params)[None]}


def _names(network: DiT) -> Iterator[tuple[str, str]]:
    """The authors' name of every tensor, and ours."""
    for name in network.state_dict():
        part, kind = name.rsplit(".", 1)
        if part.startswith("blocks."):
            _, index, inner = part.split(".", 2)
            yield f"blocks.{index}.{_BLOCK[inner]}.{kind}", name
        else:
            yield f"{_PARTS[part]}.{kind}", name


def _table(params: DiTParams) -> Tensor:
    return position_embedding(params.width, *(side // params.patch_size for side in params.image_size))


def _of(state_dict: StateDict, key: str) -> Tensor:
    if key not in state_dict:
        raise UserError(f"the checkpoint lacks the weights '{key}'.", key=key, code="missing")
    return state_dict[key]
