"""Checkpoints of guided-diffusion and improved-diffusion (OpenAI), in and out.

Their networks and ours have the same layers under other names, so a checkpoint is mapped key by key, without
loss. Arguments are those of the original constructors `UNetModel`, `SuperResModel` and `EncoderUNetModel`,
their defaults too; `image_size` may be left out, as Improved DDPM's constructor does not take it (the params
then name the smallest size that the network can take).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from carrara.entries import Entry, fixed, read_entries
from carrara.errors import UserError
from carrara.interop import heads, layout
from carrara.interop.layout import Shapes, check_expressible, difference, first_difference, strip_prefixes
from carrara.interop.unet_keys import Network, places
from carrara.networks import EncoderClassifier, EncoderClassifierParams, UNet, UNetParams
from carrara.networks.backbone import BackboneParams, cast_torso

StateDict = Mapping[str, Tensor]
AnyNetwork = TypeVar("AnyNetwork", UNet, EncoderClassifier)

REQUIRED = {
    "in_channels": Entry(int),
    "model_channels": Entry(int),
    "out_channels": Entry(int),
    "num_res_blocks": Entry(int | tuple[int, ...]),
    "attention_resolutions": Entry(tuple[int, ...], empty=True),
}
SHARED = REQUIRED | {
    "image_size": Entry(int | None, None),
    "dropout": Entry(float, 0),
    "channel_mult": Entry(tuple[float, ...], (1, 2, 4, 8)),
    "conv_resample": Entry(bool, True),
    "dims": Entry(Literal[1, 2, 3], 2),
    "use_checkpoint": Entry(bool, False),
    "use_fp16": Entry(bool, False),
    "num_heads": Entry(int, 1),
    "num_head_channels": Entry(int, -1),
    "num_heads_upsample": Entry(int, -1),
    "use_scale_shift_norm": Entry(bool, False),
    "resblock_updown": Entry(bool, False),
    "use_new_attention_order": Entry(bool, False),
}
UNET = SHARED | {"num_classes": Entry(int | None, None)}
CLASSIFIER = SHARED | {"pool": fixed("adaptive", "attention", "spatial", "spatial_v2")}
"""The arguments of the constructors, with the originals' defaults."""
OWNER = "the original's constructor"


# Networks from checkpoints, and back


def load_unet(state_dict: StateDict, **arguments: Any) -> UNet:
    """A U-Net with the checkpoint's weights, from the arguments of the original `UNetModel`.

    Raises:
        UserError: an argument is unknown or missing, or the checkpoint does not fit the arguments.
    """
    return load(UNet, unet_params(**arguments), state_dict, half=arguments.get("use_fp16", False))


def load_super_resolution(state_dict: StateDict, **arguments: Any) -> UNet:
    """An up-sampler from the arguments of the original `SuperResModel`.

    `in_channels` are the image's, as the original doubles them itself. The small image goes to
    `Condition.concat`; the network up-samples it bilinearly and concatenates it to x.
    """
    params = super_resolution_params(**arguments)
    return load(UNet, params, state_dict, half=arguments.get("use_fp16", False))


def load_classifier(state_dict: StateDict, **arguments: Any) -> EncoderClassifier:
    """A noisy classifier from the arguments of the original `EncoderUNetModel`."""
    params = classifier_params(**arguments)
    return load(EncoderClassifier, params, state_dict, half=arguments.get("use_fp16", False))


def state_dict(network: Network) -> dict[str, Tensor]:
    """The network's weights under the original's keys, for its own `load_state_dict`.

    Raises:
        UserError: the network has something that the original does not have.
    """
    _check_exportable(network.params)
    return layout.to_theirs(network, places(network))


def load(
    kind: Callable[[Any], AnyNetwork], params: BackboneParams, checkpoint: StateDict, *, half: bool = False
) -> AnyNetwork:
    """A network of our own params with the checkpoint's weights, in float32.

    Args:
        kind: `UNet` or `EncoderClassifier`.
        params: its params, from arguments or from a preset.
        checkpoint: the weights under the original's keys.
        half: turn the torso into float16, as the original's `use_fp16` does.

    Raises:
        UserError: the checkpoint does not fit the params.
    """
    network = layout.filled(lambda: kind(params), strip_prefixes(checkpoint), places)
    if half:
        cast_torso(network, torch.float16)
    return network


# Arguments


def unet_params(**arguments: Any) -> UNetParams:
    """`UNetModel`'s arguments as our params."""
    a = read_entries(arguments, UNET, OWNER)
    return UNetParams(
        **encoder_params(a),
        up_heads=other_heads(a),
        learned_variance=a["out_channels"] == 2 * a["in_channels"],
        out_channels=None if a["out_channels"] in (a["in_channels"], 2 * a["in_channels"]) else a["out_channels"],
        num_classes=a["num_classes"],
    )


def super_resolution_params(**arguments: Any) -> UNetParams:
    """`SuperResModel`'s arguments as our params."""
    params = unet_params(**arguments)
    return replace(params, concat_channels=params.in_channels, upsample_concat=True)


def classifier_params(**arguments: Any) -> EncoderClassifierParams:
    """`EncoderUNetModel`'s arguments as our params."""
    a = read_entries(arguments, CLASSIFIER, OWNER)
    for name in ("image_size", "num_head_channels") if a["pool"] == "attention" else ():
        if a[name] in (None, -1):
            raise UserError(f"a classifier with attention pooling needs the argument {name}.", key=name, code="missing")
    return EncoderClassifierParams(**encoder_params(a), num_classes=a["out_channels"], pool=a["pool"])


def other_heads(a: Mapping[str, Any]) -> int | None:
    """The heads of the decoder, where they are counted and others than the encoder's."""
    up_heads = a["num_heads_upsample"]
    return up_heads if a["num_head_channels"] == -1 and up_heads not in (-1, a["num_heads"]) else None


def encoder_params(a: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructors have in common, as params."""
    levels = len(a["channel_mult"])
    factors = [2**level for level in range(levels)]
    by_count = a["num_head_channels"] == -1
    resampling = "convolution" if a["conv_resample"] else "pooling"
    return {
        "image_size": (a["image_size"] or factors[-1],) * a["dims"],
        "in_channels": a["in_channels"],
        "channels": a["model_channels"],
        "channel_mult": a["channel_mult"],
        "blocks_per_level": a["num_res_blocks"],
        # A factor that no level has leaves attention to the middle, in the original too.
        "attention": tuple(factor for factor in factors if factor in a["attention_resolutions"]),
        "heads": a["num_heads"] if by_count else None,
        "head_channels": None if by_count else a["num_head_channels"],
        "qkv_order": "new" if a["use_new_attention_order"] else "legacy",
        "adaptive_norm": a["use_scale_shift_norm"],
        "resampling": "residual" if a["resblock_updown"] else resampling,
        "dropout": float(a["dropout"]),
        "checkpointing": a["use_checkpoint"],
    }


def infer_arguments(checkpoint: StateDict, **named: Any) -> dict[str, Any]:
    """The constructor's arguments, read from a checkpoint's shapes where these show them, else from `named`.

    Shapes show neither heads nor their order nor (but for attention pools) the image size: name `image_size`,
    `num_heads` or `num_head_channels`, and `use_new_attention_order`. An up-sampler looks like a U-Net of twice
    the channels: halve `in_channels` for `load_super_resolution`.

    Returns:
        Arguments for `load_classifier` if the checkpoint has no decoder, else for `load_unet`.

    Raises:
        UserError: something has to be named, or a named argument contradicts the shapes.
    """
    theirs = strip_prefixes(checkpoint)
    named = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    if not {"time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight"} <= theirs.keys():
        raise UserError(
            "this is no checkpoint of guided-diffusion: it lacks 'input_blocks' or 'time_embed'.",
            key="input_blocks",
            code="unsupported",
        )
    blocks = 1 + max(int(key.split(".")[1]) for key in theirs if key.startswith("input_blocks."))
    levels = [count for count in range(1, blocks + 1) if blocks % count == 0 and blocks // count > 1]
    guesses = [guess for count in levels for guess in _guesses(theirs, count, blocks // count)]
    guesses = [guess for guess in guesses if all(guess.get(key, value) == value for key, value in named.items())]
    if not guesses:
        raise UserError(
            f"the shapes of this checkpoint contradict {', '.join(f'{k} = {v}' for k, v in named.items())}.",
            key=next(iter(named), ""),
            code="mismatch",
        )
    found = layout.shapes(theirs)
    expected = [_shapes_of(guess) for guess in guesses]
    fitting = [guess for guess, shape in zip(guesses, expected, strict=True) if shape == found]
    if not fitting:
        nearest_ = max(expected, key=lambda shape: len(shape.items() & found.items()))
        raise UserError(
            f"the checkpoint fits no arguments of the original's constructor: {difference(found, nearest_)}.",
            key=first_difference(found, nearest_),
            code="mismatch",
        )
    first, *others = fitting
    open_ = sorted({key for other in others for key in other if other[key] != first[key]})
    needed = [name for name in ("image_size", "use_new_attention_order") if name not in {**first, **named}]
    if not {"num_heads", "num_head_channels"} & named.keys():
        needed.append("num_head_channels (or num_heads)")
    if open_ or needed:
        names = open_ + needed
        raise UserError(f"the shapes leave {', '.join(names)} open: name them.", key=names[0], code="missing")
    return {**first, **named}


def _guesses(theirs: StateDict, levels: int, blocks: int) -> Iterator[dict[str, Any]]:
    """What the arguments could be if there are so many levels, each of `blocks` numbered blocks."""
    starts = [1 + level * blocks for level in range(levels)]
    widths = [theirs.get(f"input_blocks.{start}.0.in_layers.2.weight") for start in starts]
    if any(width is None for width in widths):
        return
    channels = theirs["time_embed.0.weight"].shape[1]
    mult = [len(width) / channels for width in widths if width is not None]
    stem = theirs["input_blocks.0.0.weight"]
    shared = {
        "in_channels": stem.shape[1],
        "dims": stem.ndim - 2,
        "model_channels": channels,
        "num_res_blocks": blocks - 1,
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mult),
        "attention_resolutions": tuple(
            2**level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in theirs
        ),
        "use_scale_shift_norm": len(theirs["input_blocks.1.0.emb_layers.1.weight"]) == 2 * widths[0].shape[0],  # type: ignore[union-attr]
    }
    if "output_blocks.0.0.in_layers.2.weight" in theirs:
        labels = theirs.get("label_emb.weight")
        shared["out_channels"] = len(theirs["out.2.weight"])
        shared["num_classes"] = None if labels is None else len(labels)
    else:
        shared |= _pool_arguments(theirs, 2 ** (levels - 1))
    for updown, learned in ((True, True), (False, True), (False, False)):
        yield shared | {"resblock_updown": updown, "conv_resample": learned}


def _pool_arguments(theirs: StateDict, factor: int) -> dict[str, Any]:
    places = theirs.get("out.2.positional_embedding")
    if places is not None:
        size = math.isqrt(places.shape[1] - 1) * factor
        return {"pool": "attention", "out_channels": len(theirs["out.2.c_proj.weight"]), "image_size": size}
    if "out.1.weight" in theirs:
        return {"pool": "spatial_v2", "out_channels": len(theirs["out.3.weight"])}
    if "out.2.weight" in theirs:
        return {"pool": "spatial", "out_channels": len(theirs["out.2.weight"])}
    return {"pool": "adaptive", "out_channels": len(theirs["out.3.weight"])}


def _shapes_of(guess: Mapping[str, Any]) -> Shapes:
    """The shapes that arguments without heads make; a head of the last level's width stands for them."""
    with torch.device("meta"):
        if "pool" not in guess:
            return shapes(UNet(unet_params(**guess)))
        width = int(guess["channel_mult"][-1] * guess["model_channels"])
        counted = {"num_head_channels": width} if guess["pool"] == "attention" else {}
        return shapes(EncoderClassifier(classifier_params(**guess, **counted)))


def shapes(network: Network) -> Shapes:
    """The shapes of the network's weights under the original's keys (the network may be on the meta device)."""
    return layout.shapes(layout.to_theirs(network, places(network)))


def constructor_arguments(params: UNetParams | EncoderClassifierParams) -> dict[str, Any]:
    """The arguments that make the original constructor build this network: the inverse of the three above.

    For an up-sampler they are `SuperResModel`'s.

    Raises:
        UserError: the network has something that the original does not have.
    """
    _check_exportable(params)
    params = heads.with_width(params)
    arguments: dict[str, Any] = {
        "image_size": params.image_size[-1],
        "in_channels": params.in_channels,
        "model_channels": params.channels,
        "num_res_blocks": params.blocks_per_level,
        "attention_resolutions": params.attention,
        "dropout": params.dropout,
        "channel_mult": params.channel_mult,
        "conv_resample": params.resampling != "pooling",
        "dims": params.dims,
        "use_checkpoint": params.checkpointing,
        "num_heads": params.heads or 1,
        "num_head_channels": -1 if params.heads else params.head_channels,
        "use_scale_shift_norm": params.adaptive_norm,
        "resblock_updown": params.resampling == "residual",
        "use_new_attention_order": params.qkv_order == "new",
    }
    if isinstance(params, EncoderClassifierParams):
        return arguments | {"out_channels": params.num_classes, "pool": params.pool}
    return arguments | {
        "out_channels": params.raw_channels,
        "num_classes": params.labels or None,
        "num_heads_upsample": params.up_heads or -1,
    }


def common_limits(p: BackboneParams) -> tuple[tuple[str, bool, str], ...]:
    """What neither OpenAI's nor CompVis' constructors can build, for `check_expressible`."""
    varying = p.heads is None and heads.with_width(p).head_channels is None
    return (
        ("network.norm_groups", p.norm_groups != 32 or any(w % 32 for w in p.widths), "norms of other than 32 groups"),
        ("network.heads", varying, "heads of varying width"),
    )


def _check_exportable(p: BackboneParams) -> None:
    """Raises UserError unless the original's constructor can build the network."""
    unet = p if isinstance(p, UNetParams) else UNetParams()
    concat = bool(unet.concat_channels) and not unet.upsample_concat
    check_expressible(
        "guided-diffusion",
        (
            *common_limits(p),
            ("network.transformer_depth", any(p.depths), "transformer"),
            ("network.vector_channels", bool(unet.vector_channels), "condition vector"),
            ("network.concat_channels", concat, "concatenated condition of the image's size"),
        ),
    )
