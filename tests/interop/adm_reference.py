"""ADM's networks a second time, as plain functions of a state dict under the original's keys.

Written for the tests, without modules, layouts or fused kernels, so that it shares no code with the package.
Which layers there are is read from the keys; what the keys cannot tell comes from the constructor's arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def norm(w: Weights, key: str, h: Tensor) -> Tensor:
    grouped = h.reshape(len(h), 32, -1)
    grouped = grouped - grouped.mean(2, keepdim=True)
    grouped = grouped / (grouped.square().mean(2, keepdim=True) + 1e-5).sqrt()
    shape = (1, -1, *[1] * (h.ndim - 2))
    return grouped.reshape(h.shape) * w[f"{key}.weight"].reshape(shape) + w[f"{key}.bias"].reshape(shape)


def silu(h: Tensor) -> Tensor:
    return h / (1 + (-h).exp())


def conv(w: Weights, key: str, h: Tensor, stride: Any = 1) -> Tensor:
    weight, bias = w[f"{key}.weight"], w[f"{key}.bias"]
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    return function(h, weight, bias, stride=stride, padding=weight.shape[-1] // 2)


def halve(h: Tensor) -> Tensor:
    """Average of the neighbours along the last two axes (the only one of a 1-D signal)."""
    for axis in range(max(2, h.ndim - 2), h.ndim):
        h = h.unflatten(axis, (-1, 2)).mean(axis + 1)
    return h


def double(h: Tensor) -> Tensor:
    for axis in range(max(2, h.ndim - 2), h.ndim):
        h = h.repeat_interleave(2, dim=axis)
    return h


def block(w: Weights, key: str, h: Tensor, e: Tensor, a: dict[str, Any], change: Any = None) -> Tensor:
    inner = silu(norm(w, f"{key}.in_layers.0", h))
    if change is not None:
        inner, h = change(inner), change(h)
    inner = conv(w, f"{key}.in_layers.2", inner)
    told = F.linear(silu(e), w[f"{key}.emb_layers.1.weight"], w[f"{key}.emb_layers.1.bias"])
    told = told.reshape(*told.shape, *[1] * (h.ndim - 2))
    if a.get("use_scale_shift_norm"):
        half = told.shape[1] // 2
        inner = norm(w, f"{key}.out_layers.0", inner) * (1 + told[:, :half]) + told[:, half:]
    else:
        inner = norm(w, f"{key}.out_layers.0", inner + told)
    inner = conv(w, f"{key}.out_layers.3", silu(inner))
    skip = conv(w, f"{key}.skip_connection", h) if f"{key}.skip_connection.weight" in w else h
    return skip + inner


def attend(qkv: Tensor, heads: int, new: bool) -> Tensor:
    """[B, 3·C, N] to [B, C, N]."""
    batch, width, count = qkv.shape
    d = width // 3 // heads
    out = torch.empty(batch, width // 3, count, dtype=qkv.dtype)
    for head in range(heads):
        if new:
            q, k, v = (qkv[:, i * width // 3 + head * d :][:, :d] for i in range(3))
        else:
            q, k, v = (qkv[:, (3 * head + i) * d :][:, :d] for i in range(3))
        weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(d)
        out[:, head * d : (head + 1) * d] = torch.einsum("bts,bcs->bct", weight.softmax(-1), v)
    return out


def attention(w: Weights, key: str, h: Tensor, a: dict[str, Any], up: bool = False) -> Tensor:
    heads = a.get("num_heads", 1)
    if up and a.get("num_heads_upsample", -1) != -1:
        heads = a["num_heads_upsample"]
    if a.get("num_head_channels", -1) != -1:
        heads = h.shape[1] // a["num_head_channels"]
    qkv = conv(w, f"{key}.qkv", norm(w, f"{key}.norm", h).flatten(2))
    out = conv(w, f"{key}.proj_out", attend(qkv, heads, a.get("use_new_attention_order", False)))
    return h + out.reshape(h.shape)


def embed(w: Weights, t: Tensor) -> Tensor:
    width = w["time_embed.0.weight"].shape[1]
    rates = torch.tensor([10000.0 ** (-i / (width // 2)) for i in range(width // 2)])
    angles = t[:, None].float() * rates
    waves = torch.cat([angles.cos(), angles.sin(), torch.zeros(len(t), width % 2)], dim=1)
    hidden = silu(F.linear(waves, w["time_embed.0.weight"], w["time_embed.0.bias"]))
    return F.linear(hidden, w["time_embed.2.weight"], w["time_embed.2.bias"])


def encode(w: Weights, x: Tensor, e: Tensor, a: dict[str, Any]) -> list[Tensor]:
    """Every map of the encoder, and the middle block's output last."""
    maps = [conv(w, "input_blocks.0.0", x)]
    number = 0
    stride = (1, 2, 2) if x.ndim == 5 else 2
    for level in range(len(a["channel_mult"])):
        for _ in range(a["num_res_blocks"]):
            number += 1
            h = block(w, f"input_blocks.{number}.0", maps[-1], e, a)
            if 2**level in a["attention_resolutions"]:
                h = attention(w, f"input_blocks.{number}.1", h, a)
            maps.append(h)
        if level < len(a["channel_mult"]) - 1:
            number += 1
            if a.get("resblock_updown"):
                maps.append(block(w, f"input_blocks.{number}.0", maps[-1], e, a, halve))
            elif a.get("conv_resample", True):
                maps.append(conv(w, f"input_blocks.{number}.0.op", maps[-1], stride))
            else:
                maps.append(halve(maps[-1]))
    h = block(w, "middle_block.0", maps[-1], e, a)
    h = attention(w, "middle_block.1", h, a)
    return [*maps, block(w, "middle_block.2", h, e, a)]


def unet(w: Weights, x: Tensor, t: Tensor, y: Tensor | None, a: dict[str, Any]) -> Tensor:
    e = embed(w, t)
    if y is not None:
        e = e + w["label_emb.weight"][y]
    *maps, h = encode(w, x, e, a)
    number = 0
    for level in reversed(range(len(a["channel_mult"]))):
        for index in range(a["num_res_blocks"] + 1):
            key = f"output_blocks.{number}"
            h = block(w, f"{key}.0", torch.cat([h, maps.pop()], dim=1), e, a)
            layer = 1
            if 2**level in a["attention_resolutions"]:
                h = attention(w, f"{key}.1", h, a, up=True)
                layer = 2
            if level and index == a["num_res_blocks"]:
                if a.get("resblock_updown"):
                    h = block(w, f"{key}.{layer}", h, e, a, double)
                else:
                    h = double(h)
                    if a.get("conv_resample", True):
                        h = conv(w, f"{key}.{layer}.conv", h)
            number += 1
    return conv(w, "out.2", silu(norm(w, "out.0", h)))


def classifier(w: Weights, x: Tensor, t: Tensor, a: dict[str, Any]) -> Tensor:
    maps = encode(w, x, embed(w, t), a)
    pool = a.get("pool", "adaptive")
    if pool == "adaptive":
        h = silu(norm(w, "out.0", maps[-1])).mean((2, 3))
        return F.linear(h, w["out.3.weight"][:, :, 0, 0], w["out.3.bias"])
    if pool == "attention":
        h = silu(norm(w, "out.0", maps[-1])).flatten(2)
        h = torch.cat([h.mean(2, keepdim=True), h], dim=2) + w["out.2.positional_embedding"]
        heads = h.shape[1] // a["num_head_channels"]
        return conv(w, "out.2.c_proj", attend(conv(w, "out.2.qkv_proj", h), heads, new=True))[:, :, 0]
    h = torch.cat([m.mean((2, 3)) for m in maps], dim=1)
    h = F.linear(h, w["out.0.weight"], w["out.0.bias"])
    if pool == "spatial":
        return F.linear(h.clamp(min=0), w["out.2.weight"], w["out.2.bias"])
    return F.linear(silu(norm(w, "out.1", h)), w["out.3.weight"], w["out.3.bias"])
