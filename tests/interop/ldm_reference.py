"""CompVis' U-Net a second time: its forward pass as plain functions of a state dict, and its keys with their shapes.

Written for the tests from the original architecture, without modules or fused kernels, beside `adm_reference`, from
which it takes the layers that the two originals share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.interop.adm_reference import Weights, attention, block, conv, double, embed, halve, norm, silu

Shapes = dict[str, tuple[int, ...]]


def layer_norm(w: Weights, key: str, h: Tensor) -> Tensor:
    h = h - h.mean(-1, keepdim=True)
    return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]


def look(w: Weights, key: str, tokens: Tensor, context: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    q, k, v = (s @ w[f"{key}.to_{n}.weight"].T for n, s in (("q", tokens), ("k", context), ("v", context)))
    out = torch.empty_like(q)
    d = q.shape[-1] // heads
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.finfo(scores.dtype).max)
        out[..., part] = scores.softmax(-1) @ v[..., part]
    return out @ w[f"{key}.to_out.0.weight"].T + w[f"{key}.to_out.0.bias"]


def transformer(
    w: Weights, key: str, x: Tensor, context: Tensor, heads: int, elsewhere: bool = False, mask: Tensor | None = None
) -> Tensor:
    """SpatialTransformer; `elsewhere` is its `disable_self_attn`."""
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, 32, -1)
    grouped = grouped - grouped.mean(2, keepdim=True)
    h = (grouped / (grouped.square().mean(2, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    h = h * w[f"{key}.norm.weight"][:, None, None] + w[f"{key}.norm.bias"][:, None, None]
    h = h.flatten(2).transpose(1, 2) @ w[f"{key}.proj_in.weight"].flatten(1).T + w[f"{key}.proj_in.bias"]
    number = 0
    while f"{key}.transformer_blocks.{number}.norm1.weight" in w:
        b = f"{key}.transformer_blocks.{number}"
        normed = layer_norm(w, f"{b}.norm1", h)
        h = h + look(w, f"{b}.attn1", normed, context if elsewhere else normed, heads, mask if elsewhere else None)
        h = h + look(w, f"{b}.attn2", layer_norm(w, f"{b}.norm2", h), context, heads, mask)
        inner = layer_norm(w, f"{b}.norm3", h) @ w[f"{b}.ff.net.0.proj.weight"].T + w[f"{b}.ff.net.0.proj.bias"]
        value, gate = inner.split(inner.shape[-1] // 2, -1)
        gate = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        h = h + (value * gate) @ w[f"{b}.ff.net.2.weight"].T + w[f"{b}.ff.net.2.bias"]
        number += 1
    h = h @ w[f"{key}.proj_out.weight"].flatten(1).T + w[f"{key}.proj_out.bias"]
    return x + h.transpose(1, 2).reshape(batch, channels, height, width)


def told(w: Weights, y: Tensor | None) -> Tensor | float:
    if y is None:
        return 0.0
    if "label_emb.0.0.weight" in w:
        return F.linear(
            silu(F.linear(y, w["label_emb.0.0.weight"], w["label_emb.0.0.bias"])), *_pair(w, "label_emb.0.2")
        )
    if "label_emb.bias" in w:
        return F.linear(y, *_pair(w, "label_emb"))
    return w["label_emb.weight"][y]


def _pair(w: Weights, key: str) -> tuple[Tensor, Tensor]:
    return w[f"{key}.weight"], w[f"{key}.bias"]


def unet(
    w: Weights,
    x: Tensor,
    t: Tensor,
    a: dict[str, Any],
    context: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    levels = len(a["channel_mult"])
    blocks = a["num_res_blocks"] if not isinstance(a["num_res_blocks"], int) else [a["num_res_blocks"]] * levels
    disabled = a.get("disable_self_attentions") or [False] * levels
    e = embed(w, t) + told(w, y)

    def see(key: str, h: Tensor, elsewhere: bool, up: bool = False) -> Tensor:
        if not a.get("use_spatial_transformer"):
            # The original passes the heads' width on where `legacy` is off, which outweighs the decoder's own number.
            if not a.get("legacy", True) and a.get("num_head_channels", -1) == -1:
                return attention(w, key, h, a)
            return attention(w, key, h, a, up)
        assert context is not None
        by_width = a.get("num_head_channels", -1) != -1
        heads = h.shape[1] // a["num_head_channels"] if by_width else a["num_heads"]
        return transformer(w, key, h, context, heads, elsewhere, mask)

    maps = [conv(w, "input_blocks.0.0", x)]
    for level in range(levels):
        for _ in range(blocks[level]):
            key = f"input_blocks.{len(maps)}"
            h = block(w, f"{key}.0", maps[-1], e, a)
            maps.append(see(f"{key}.1", h, disabled[level]) if 2**level in a["attention_resolutions"] else h)
        if level < levels - 1:
            key = f"input_blocks.{len(maps)}.0"
            if a.get("resblock_updown"):
                maps.append(block(w, key, maps[-1], e, a, halve))
            elif a.get("conv_resample", True):
                maps.append(conv(w, f"{key}.op", maps[-1], (1, 2, 2) if x.ndim == 5 else 2))
            else:
                maps.append(halve(maps[-1]))
    h = block(w, "middle_block.0", maps[-1], e, a)
    h = see("middle_block.1", h, a.get("disable_middle_self_attn", False))
    h = block(w, "middle_block.2", h, e, a)
    number = 0
    for level in reversed(range(levels)):
        for index in range(blocks[level] + 1):
            key = f"output_blocks.{number}"
            h = block(w, f"{key}.0", torch.cat([h, maps.pop()], 1), e, a)
            layer = 1
            if 2**level in a["attention_resolutions"]:
                h, layer = see(f"{key}.1", h, disabled[level], up=True), 2
            if level and index == blocks[level]:
                if a.get("resblock_updown"):
                    h = block(w, f"{key}.{layer}", h, e, a, double)
                else:
                    h = double(h)
                    h = conv(w, f"{key}.{layer}.conv", h) if a.get("conv_resample", True) else h
            number += 1
    return conv(w, "out.2", silu(norm(w, "out.0", h)))


class Listing:
    """The original's keys with their shapes, collected while its constructor is followed."""

    def __init__(self, a: dict[str, Any]) -> None:
        self.a = a
        self.shapes: Shapes = {}
        self.embedding = 4 * a["model_channels"]
        self.kernel = (3,) * a.get("dims", 2)

    def put(self, key: str, *weight: int, bias: bool = True) -> None:
        self.shapes[f"{key}.weight"] = weight
        if bias:
            self.shapes[f"{key}.bias"] = weight[:1]

    def block(self, key: str, channels: int, out: int) -> None:
        self.put(f"{key}.in_layers.0", channels)
        self.put(f"{key}.in_layers.2", out, channels, *self.kernel)
        self.put(f"{key}.emb_layers.1", out * (2 if self.a.get("use_scale_shift_norm") else 1), self.embedding)
        self.put(f"{key}.out_layers.0", out)
        self.put(f"{key}.out_layers.3", out, out, *self.kernel)
        if channels != out:
            self.put(f"{key}.skip_connection", out, channels, *[1] * len(self.kernel))

    def see(self, key: str, c: int, elsewhere: bool) -> None:
        self.put(f"{key}.norm", c)
        if not self.a.get("use_spatial_transformer"):
            self.put(f"{key}.qkv", 3 * c, c, 1)
            self.put(f"{key}.proj_out", c, c, 1)
            return
        ones = () if self.a.get("use_linear_in_transformer") else (1, 1)
        d = self.a["context_dim"]
        d = d[0] if isinstance(d, list) else d
        self.put(f"{key}.proj_in", c, c, *ones)
        self.put(f"{key}.proj_out", c, c, *ones)
        for number in range(self.a.get("transformer_depth", 1)):
            b = f"{key}.transformer_blocks.{number}"
            for name, seen in (("attn1", d if elsewhere else c), ("attn2", d)):
                self.put(f"{b}.{name}.to_q", c, c, bias=False)
                self.put(f"{b}.{name}.to_k", c, seen, bias=False)
                self.put(f"{b}.{name}.to_v", c, seen, bias=False)
                self.put(f"{b}.{name}.to_out.0", c, c)
            self.put(f"{b}.ff.net.0.proj", 8 * c, c)
            self.put(f"{b}.ff.net.2", c, 4 * c)
            for norm_ in ("norm1", "norm2", "norm3"):
                self.put(f"{b}.{norm_}", c)

    def label(self) -> None:
        classes = self.a.get("num_classes")
        if isinstance(classes, int):
            self.put("label_emb", classes, self.embedding, bias=False)
        elif classes == "continuous":
            self.put("label_emb", self.embedding, 1)
        elif classes == "sequential":
            self.put("label_emb.0.0", self.embedding, self.a["adm_in_channels"])
            self.put("label_emb.0.2", self.embedding, self.embedding)


def expected_shapes(a: dict[str, Any]) -> Shapes:
    """Every key of the original `UNetModel(**a)` and its shape."""
    w = Listing(a)
    base, levels = a["model_channels"], len(a["channel_mult"])
    blocks = a["num_res_blocks"] if not isinstance(a["num_res_blocks"], int) else [a["num_res_blocks"]] * levels
    disabled = a.get("disable_self_attentions") or [False] * levels
    w.put("time_embed.0", w.embedding, base)
    w.put("time_embed.2", w.embedding, w.embedding)
    w.label()
    w.put("input_blocks.0.0", base, a["in_channels"], *w.kernel)
    skips, c, number = [base], base, 1
    for level, mult in enumerate(a["channel_mult"]):
        for _ in range(blocks[level]):
            w.block(f"input_blocks.{number}.0", c, mult * base)
            c = mult * base
            if 2**level in a["attention_resolutions"]:
                w.see(f"input_blocks.{number}.1", c, disabled[level])
            skips.append(c)
            number += 1
        if level < levels - 1:
            if a.get("resblock_updown"):
                w.block(f"input_blocks.{number}.0", c, c)
            elif a.get("conv_resample", True):
                w.put(f"input_blocks.{number}.0.op", c, c, *w.kernel)
            skips.append(c)
            number += 1
    w.block("middle_block.0", c, c)
    w.see("middle_block.1", c, a.get("disable_middle_self_attn", False))
    w.block("middle_block.2", c, c)
    number = 0
    for level in reversed(range(levels)):
        for index in range(blocks[level] + 1):
            key = f"output_blocks.{number}"
            w.block(f"{key}.0", c + skips.pop(), a["channel_mult"][level] * base)
            c = a["channel_mult"][level] * base
            layer = 1
            if 2**level in a["attention_resolutions"]:
                w.see(f"{key}.1", c, disabled[level])
                layer = 2
            if level and index == blocks[level]:
                if a.get("resblock_updown"):
                    w.block(f"{key}.{layer}", c, c)
                elif a.get("conv_resample", True):
                    w.put(f"{key}.{layer}.conv", c, c, *w.kernel)
            number += 1
    w.put("out.0", c)
    w.put("out.2", a["out_channels"], base, *w.kernel)
    return w.shapes
