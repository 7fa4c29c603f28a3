"""The keys and shapes of the original first stages, written out from their constructors' structure.

Shares nothing with the package's adapters: it counts down and up through the levels as the originals do.
"""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]


def conv(keys: Shapes, name: str, channels: int, out: int, size: int = 3) -> None:
    keys[f"{name}.weight"] = (out, channels, size, size)
    keys[f"{name}.bias"] = (out,)


def norm(keys: Shapes, name: str, channels: int) -> None:
    keys[f"{name}.weight"] = keys[f"{name}.bias"] = (channels,)


def resnet(keys: Shapes, name: str, channels: int, out: int) -> None:
    norm(keys, f"{name}.norm1", channels)
    conv(keys, f"{name}.conv1", channels, out)
    norm(keys, f"{name}.norm2", out)
    conv(keys, f"{name}.conv2", out, out)
    if channels != out:
        conv(keys, f"{name}.nin_shortcut", channels, out, 1)


def attn(keys: Shapes, name: str, channels: int) -> None:
    norm(keys, f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        conv(keys, f"{name}.{part}", channels, channels, 1)


def middle(keys: Shapes, half: str, channels: int, attends: bool) -> None:
    resnet(keys, f"{half}.mid.block_1", channels, channels)
    if attends:
        attn(keys, f"{half}.mid.attn_1", channels)
    resnet(keys, f"{half}.mid.block_2", channels, channels)


def first_stage(arguments: dict[str, Any]) -> Shapes:
    """All keys of `AutoencoderKL`, `VQModel` or `GumbelVQ` but those of the loss."""
    d = arguments["ddconfig"]
    keys: Shapes = {}
    ch, mult, blocks, levels = d["ch"], d["ch_mult"], d["num_res_blocks"], len(d["ch_mult"])
    attends = d.get("attn_type") != "none"
    conv(keys, "encoder.conv_in", d["in_channels"], ch)
    resolution, width = d["resolution"], ch
    for i in range(levels):
        for j in range(blocks):
            resnet(keys, f"encoder.down.{i}.block.{j}", width, ch * mult[i])
            width = ch * mult[i]
            if attends and resolution in d["attn_resolutions"]:
                attn(keys, f"encoder.down.{i}.attn.{j}", width)
        if i != levels - 1:
            conv(keys, f"encoder.down.{i}.downsample.conv", width, width)
            resolution //= 2
    middle(keys, "encoder", width, attends)
    norm(keys, "encoder.norm_out", width)
    z = d["z_channels"] * (2 if d["double_z"] else 1)
    conv(keys, "encoder.conv_out", width, z)
    conv(keys, "decoder.conv_in", d["z_channels"], width)
    middle(keys, "decoder", width, attends)
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            resnet(keys, f"decoder.up.{i}.block.{j}", width, ch * mult[i])
            width = ch * mult[i]
            if attends and resolution in d["attn_resolutions"]:
                attn(keys, f"decoder.up.{i}.attn.{j}", width)
        if i != 0:
            conv(keys, f"decoder.up.{i}.upsample.conv", width, width)
            resolution *= 2
    norm(keys, "decoder.norm_out", width)
    conv(keys, "decoder.conv_out", width, d["out_ch"])
    embed = arguments["embed_dim"]
    conv(keys, "quant_conv", z, 2 * embed if d["double_z"] else embed, 1)
    conv(keys, "post_quant_conv", embed, d["z_channels"], 1)
    if "kl_weight" in arguments:
        conv(keys, "quantize.proj", d["z_channels"], arguments["n_embed"], 1)
        keys["quantize.embed.weight"] = (arguments["n_embed"], embed)
    elif "n_embed" in arguments:
        keys["quantize.embedding.weight"] = (arguments["n_embed"], embed)
    return keys
