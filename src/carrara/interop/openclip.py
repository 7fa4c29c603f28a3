"""Text encoders of CLIP in two layouts: OpenCLIP's (Stable Diffusion 2 and XL) to and from that of transformers.

| OpenCLIP | transformers |
|---|---|
| `positional_embedding` | `embeddings.position_embedding.weight` |
| `transformer.resblocks.N.attn.in_proj_weight` [3·D, D] | `encoder.layers.N.self_attn.{q,k,v}_proj.weight` |
| `text_projection` [D, E] | `text_projection.weight` [E, D] |
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from carrara.errors import UserError

_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTION = "text_projection"
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_IGNORED = ("logit_scale", "attn_mask", "logit_bias")


def to_transformers(state: Mapping[str, Tensor], layers: int | None = None) -> dict[str, Tensor]:
    """The weights of `CLIPTextModel` (without its old prefix `text_model.`), with `text_projection.weight` where the
    original has one.

    Args:
        state: of an OpenCLIP text encoder; what belongs to images is not read.
        layers: how many of its layers are used: Stable Diffusion 2 drops the last. None is all.

    Raises:
        UserError: a weight is missing or unknown; `key` is its name.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        layer = _LAYER.fullmatch(key)
        if layer is not None:
            if layers is None or int(layer[1]) < layers:
                found |= _layer(f"encoder.layers.{layer[1]}", layer[2], key, value)
        elif key in _TOP:
            found[_TOP[key]] = value
        elif key == _PROJECTION:
            found["text_projection.weight"] = value.T.contiguous()
        elif not key.startswith(("visual.", *_IGNORED)):
            raise UserError(f"a text encoder of OpenCLIP has no weight {key}.", key=key, code="unknown")
    for key, name in _TOP.items():
        if name not in found:
            raise UserError(f"the text encoder of OpenCLIP lacks {key}.", key=key, code="missing")
    return found


def _layer(place: str, name: str, key: str, value: Tensor) -> dict[str, Tensor]:
    """One weight of a layer, or the three that a joint one holds."""
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        parts = value.chunk(3)
        return {f"{place}.self_attn.{q}_proj.{kind}": p.clone() for q, p in zip("qkv", parts, strict=True)}
    part, _, kind = name.rpartition(".")
    if part not in _IN_LAYER:
        raise UserError(f"a text encoder of OpenCLIP has no weight {key}.", key=key, code="unknown")
    return {f"{place}.{_IN_LAYER[part]}.{kind}": value}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in OpenCLIP's layout: the inverse of `to_transformers`.

    Raises:
        UserError: a weight that OpenCLIP's layout has no place for; `key` is its name.
    """
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    top = {name: key for key, name in _TOP.items()}
    parts = {name: key for key, name in _IN_LAYER.items()}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in top:
            found[top[key]] = value
        elif key == "text_projection.weight":
            found[_PROJECTION] = value.T.contiguous()
        elif layer is not None and layer[2] in parts:
            found[f"transformer.resblocks.{layer[1]}.{parts[layer[2]]}.{layer[3]}"] = value
        elif layer is not None and layer[2] == "self_attn.q_proj":
            joint = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(joint)
        elif layer is None or layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            if key.endswith("position_ids"):
                continue
            raise UserError(f"OpenCLIP's layout has no place for {key}.", key=key, code="unsupported")
    return found
