"""U-Nets of latent diffusion and Stable Diffusion 1.x and 2.x (CompVis, Stability AI), in and out.

Arguments are those of the original constructor `UNetModel` of `openaimodel.py`, its defaults too. It grew from
guided-diffusion's, and so do its keys: see `carrara.interop.unet_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from carrara.entries import IGNORED, Entry, fixed, read_entries
from carrara.errors import UserError
from carrara.interop import guided_diffusion, heads, layout
from carrara.interop.guided_diffusion import OWNER, REQUIRED, StateDict, common_limits, encoder_params, shapes
from carrara.interop.layout import WRAPPERS, Shapes, check_expressible, difference, first_difference, strip_prefixes
from carrara.interop.unet_keys import places
from carrara.networks import UNet, UNetParams
from carrara.networks.backbone import cast_torso

ARGUMENTS = guided_diffusion.UNET | {
    "num_classes": Entry(int | Literal["continuous", "sequential"] | None, None),
    "num_heads": Entry(int, -1),
    "use_bf16": Entry(bool, False),
    "use_spatial_transformer": Entry(bool, False),
    "transformer_depth": Entry(int, 1),
    "context_dim": Entry(int | tuple[int, ...] | None, None),
    "n_embed": fixed(None),
    "legacy": Entry(bool, True),
    "disable_self_attentions": Entry(tuple[bool, ...] | None, None),
    "num_attention_blocks": fixed(None),
    "disable_middle_self_attn": Entry(bool, False),
    "use_linear_in_transformer": Entry(bool, False),
    "adm_in_channels": Entry(int | None, None),
    "spatial_transformer_attn_type": IGNORED,  # chooses a kernel, whose results are the same
}
"""The constructor's arguments, with the original's defaults."""
PART = "model.diffusion_model."
"""Where a latent diffusion model's checkpoint keeps its U-Net."""
MEAN = "model_ema."
"""Where it keeps the running mean of the U-Net, under names without their dots."""
CLASSES = "cond_stage_model.embedding.weight"
"""Where a class-conditional one keeps its embedding of the classes."""


# Networks from checkpoints, and back


def load_unet(
    state_dict: StateDict,
    *,
    concat_channels: int = 0,
    class_tokens: bool = False,
    null_label: bool = False,
    ema: bool = False,
    **arguments: Any,
) -> UNet:
    """A U-Net with the checkpoint's weights, from the arguments of the original `UNetModel`.

    Args:
        state_dict: the U-Net's own, or that of a whole latent diffusion model, of which its part is taken.
        concat_channels: how many of `in_channels` are concatenated to x (mask, low-resolution image, depth); they come
            from `Condition.concat`. In the original the U-Net's caller joins them.
        class_tokens: take the class embedder of a whole model, too: `Condition.label` then takes the place of the
            context.
        null_label: the last class means "no class".
        ema: take the running mean of the weights that a whole model's checkpoint may hold.
        arguments: the original constructor's; where some that it needs are left out, they are read from the shapes
            (see `infer_arguments`). With an int as `num_classes`, its `y` is `Condition.label`; with
            "continuous" or "sequential" it is `Condition.vector`. `image_size` may be left out.

    Raises:
        UserError: an argument is unknown, missing or unsupported, or the checkpoint does not fit the arguments.
    """
    weights = unet_weights(state_dict, ema)
    if any(name not in arguments for name in REQUIRED):
        arguments = infer_arguments(weights, **arguments)
    params = unet_params(concat_channels=concat_channels, **arguments)
    if class_tokens:
        weights["label_emb.weight"] = _class_table(state_dict)
        classes = len(weights["label_emb.weight"]) - null_label
        params = replace(params, num_classes=classes, null_label=null_label, label_tokens=1)
    elif null_label and params.num_classes is not None:
        params = replace(params, num_classes=params.num_classes - 1, null_label=True)
    network = guided_diffusion.load(UNet, params, weights, half=arguments.get("use_fp16", False))
    if arguments.get("use_bf16", False):
        cast_torso(network, torch.bfloat16)
    return network


def _class_table(checkpoint: StateDict) -> Tensor:
    table = strip_prefixes(checkpoint).get(CLASSES)
    if table is None:
        raise UserError(
            f"the checkpoint contains no class embedder ('{CLASSES}'): load it without class_tokens.",
            key=CLASSES,
            code="missing",
        )
    return table


def unet_state_dict(network: UNet) -> dict[str, Tensor]:
    """The network's weights under the original's keys, for its own `load_state_dict`.

    Raises:
        UserError: the network has something that the original does not have.
    """
    check_exportable(network.params)
    return layout.to_theirs(network, places(network))


def unet_weights(checkpoint: StateDict, ema: bool = False) -> dict[str, Tensor]:
    """The U-Net's part of a checkpoint, under the U-Net's own keys.

    Args:
        checkpoint: a whole latent diffusion model's, or the U-Net's own.
        ema: the running mean in place of the last weights.

    Raises:
        UserError: there is no running mean in the checkpoint.
    """
    whole = strip_prefixes(checkpoint)
    own = {key.removeprefix(PART): value for key, value in whole.items() if key.startswith(PART)}
    if not ema:
        return own or whole
    dotless = {MEAN + "diffusion_model" + key.replace(".", ""): key for key in own}
    plain = {_without_wrappers(key): value for key, value in whole.items() if key.startswith(MEAN)}
    mean = {dotless[key]: value for key, value in plain.items() if key in dotless}
    if len(mean) < len(own) or not own:
        raise UserError(
            f"the checkpoint contains no running mean of its U-Net ('{MEAN}…'), only the last weights.",
            key=MEAN,
            code="missing",
        )
    return mean


def _without_wrappers(key: str) -> str:
    """The name of a running mean, which has no dots, without the wrapper of a compiled or a parallel U-Net."""
    for wrapper in WRAPPERS:
        key = key.replace(f"diffusion_model{wrapper}", "diffusion_model")
    return key


# Arguments


def unet_params(*, concat_channels: int = 0, **arguments: Any) -> UNetParams:
    """`UNetModel`'s arguments as our params; for `concat_channels` see `load_unet`."""
    a = read_entries(arguments, ARGUMENTS, OWNER)
    if a["num_heads"] == -1 and a["num_head_channels"] == -1:
        raise UserError(f"{OWNER} needs num_heads or num_head_channels.", key="num_heads", code="missing")
    conditions: dict[str, Any] = {"num_classes": a["num_classes"]}
    if a["num_classes"] == "continuous":
        conditions = {"vector_channels": 1}
    elif a["num_classes"] == "sequential":
        if a["adm_in_channels"] is None:
            raise UserError(
                'num_classes = "sequential" needs the argument adm_in_channels.', key="adm_in_channels", code="missing"
            )
        conditions = {"vector_channels": a["adm_in_channels"], "vector_layers": 2}
    in_channels = a["in_channels"] - concat_channels
    if concat_channels < 0 or in_channels < 1:
        raise UserError(
            f"concat_channels = {concat_channels} of in_channels = {a['in_channels']} leave no x.",
            key="concat_channels",
        )
    by_count = a["legacy"] and not a["use_spatial_transformer"]
    return UNetParams(
        **encoder_params(a)
        | conditions
        | _transformer_params(a, len(a["channel_mult"]))
        | {
            "in_channels": in_channels,
            "concat_channels": concat_channels,
            "out_channels": None if a["out_channels"] == in_channels else a["out_channels"],
            "up_heads": guided_diffusion.other_heads(a) if by_count else None,
        }
    )


def _transformer_params(a: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """The params of what attends, where it is a transformer."""
    context = a["context_dim"]
    if not a["use_spatial_transformer"]:
        if context is not None:
            raise UserError(
                "context_dim needs use_spatial_transformer = True.", key="use_spatial_transformer", code="missing"
            )
        return {}
    if a["dims"] != 2:
        raise UserError("use_spatial_transformer needs dims = 2, as in the original.", key="dims", code="unsupported")
    widths = set(context) if isinstance(context, tuple) else {context}
    if len(widths) != 1 or None in widths:
        raise UserError(f"context_dim is {context}: a transformer needs one width of the context.", key="context_dim")
    disabled = a["disable_self_attentions"] or (False,) * levels
    if len(disabled) != levels:
        raise UserError(
            f"disable_self_attentions has {len(disabled)} entries for {levels} levels.",
            key="disable_self_attentions",
            code="mismatch",
        )
    return {
        "transformer_depth": a["transformer_depth"],
        "context_channels": widths.pop(),
        "context_only": tuple(2**level for level, only in enumerate(disabled) if only),
        "context_only_middle": a["disable_middle_self_attn"],
        "projection": "linear" if a["use_linear_in_transformer"] else "convolution",
    }


def constructor_arguments(params: UNetParams) -> dict[str, Any]:
    """The arguments that make the original's constructor build this network: the inverse of `unet_params`.

    Its `in_channels` hold `concat_channels` too.

    Raises:
        UserError: the network has something that the original does not have.
    """
    check_exportable(params)
    params = heads.with_width(params)
    plain = replace(
        params,
        transformer_depth=0,
        context_channels=0,
        context_only=(),
        context_only_middle=False,
        vector_channels=0,
        concat_channels=0,
    )
    arguments = guided_diffusion.constructor_arguments(plain) | {
        "in_channels": params.in_channels + params.concat_channels,
        "num_heads": params.heads or -1,
        "legacy": True,
    }
    if params.vector_channels and params.vector_layers == 2:
        arguments |= {"num_classes": "sequential", "adm_in_channels": params.vector_channels}
    elif params.vector_channels:
        arguments["num_classes"] = "continuous"
    if not any(params.depths):
        return arguments
    return arguments | {
        "use_spatial_transformer": True,
        "transformer_depth": params.depths[-1],
        "context_dim": params.context_channels,
        "use_linear_in_transformer": params.projection == "linear",
        "disable_self_attentions": [factor in params.context_only for factor in params.factors],
        "disable_middle_self_attn": params.context_only_middle,
    }


def check_exportable(params: UNetParams) -> None:
    """Raises UserError unless the original's constructor can build the network."""
    p, attends = params, any(params.depths)
    vector = p.vector_channels and (p.labels or (p.vector_layers == 1 and p.vector_channels > 1))
    check_expressible(
        "CompVis' U-Net",
        (
            *common_limits(p),
            ("network.transformer_depth", len(set(p.depths)) > 1, "transformers of varying depth"),
            ("network.context_channels", attends and not p.context_channels, "transformers without a context"),
            ("network.up_heads", attends and p.up_heads is not None, "other heads in the decoder's transformers"),
            ("network.label_tokens", bool(p.label_tokens), "classes as context (its class embedder is another model)"),
            ("network.upsample_concat", p.upsample_concat, "concatenated condition of another size"),
            ("network.vector_channels", bool(vector), "such condition vector"),
            ("network.learned_variance", p.learned_variance, "learned variance"),
        ),
    )


def infer_arguments(checkpoint: StateDict, **named: Any) -> dict[str, Any]:
    """The constructor's arguments, read from a checkpoint's shapes, and `named` for what these do not show.

    Shapes show neither the heads, which have to be named (`num_heads` or `num_head_channels`), nor the order in
    which plain attention counts its channels (`use_new_attention_order`), nor what is no part of the weights
    (`image_size`, `dropout`, `use_checkpoint`). Where a level is as wide as the context, nobody can see whether its
    self-attention is disabled: it is taken not to be.

    Raises:
        UserError: the heads are not named, or the shapes fit no arguments or contradict a named one.
    """
    found = layout.shapes(unet_weights(checkpoint))
    if not {"time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.2.weight"} <= found.keys():
        raise UserError(
            "this is no checkpoint of a CompVis U-Net: it lacks 'time_embed', 'input_blocks' or such.",
            key="input_blocks",
            code="unsupported",
        )
    if not {"num_heads", "num_head_channels"} & named.keys():
        raise UserError(
            "shapes do not show the heads of attention: name num_heads or num_head_channels.",
            key="num_heads",
            code="missing",
        )
    arguments = _read_shape(found) | _read_label(found) | _read_transformers(found) | named
    with torch.device("meta"):
        expected = shapes(UNet(unet_params(**arguments)))
    if expected != found:
        raise UserError(
            f"the checkpoint does not fit the arguments that were named or read: {difference(found, expected)}.",
            key=first_difference(found, expected),
            code="mismatch",
        )
    return arguments


def _read_shape(found: Shapes) -> dict[str, Any]:
    """Levels, widths and how sizes change. On the way up a change of size is the last layer of a level's last block;
    without weights of its own it leaves a gap in the numbers on the way down."""
    down = {int(key.split(".")[1]) for key in found if key.startswith("input_blocks.")}
    last = max(int(key.split(".")[1]) for key in found if key.startswith("output_blocks."))
    convolutions = [n for n in range(last) for layer in (1, 2) if f"output_blocks.{n}.{layer}.conv.weight" in found]
    residual = [n for n in range(last) for layer in (1, 2) if f"output_blocks.{n}.{layer}.in_layers.2.weight" in found]
    gaps = [n for n in range(max(down)) if n not in down]
    if gaps:
        starts = [0, *gaps, max(down) + 1]
        blocks = [after - before - 1 for before, after in pairwise(starts)]
    else:
        ends = [-1, *(convolutions or residual), last]
        blocks = [after - before - 1 for before, after in pairwise(ends)][::-1]
    channels = found["time_embed.0.weight"][1]
    mult, attended, disabled, number = [], [], [], last
    for level, count in enumerate(blocks):
        mult.append(found[f"output_blocks.{number}.0.out_layers.3.weight"][0] / channels)
        if f"output_blocks.{number}.1.norm.weight" in found:
            attended.append(2**level)
        disabled.append(_disabled(found, f"output_blocks.{number}.1"))
        number -= count + 1
    hidden = found["output_blocks.0.0.out_layers.3.weight"][0]
    return {
        "in_channels": found["input_blocks.0.0.weight"][1],
        "model_channels": channels,
        "out_channels": found["out.2.weight"][0],
        "num_res_blocks": blocks[0] if len(set(blocks)) == 1 else tuple(blocks),
        "attention_resolutions": tuple(attended),
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mult),
        "dims": len(found["input_blocks.0.0.weight"]) - 2,
        "conv_resample": not gaps,
        "resblock_updown": bool(residual),
        "disable_self_attentions": disabled if any(disabled) else None,
        "use_scale_shift_norm": found["output_blocks.0.0.emb_layers.1.weight"][0] == 2 * hidden,
    }


def _read_label(found: Shapes) -> dict[str, Any]:
    if "label_emb.0.0.weight" in found:
        return {"num_classes": "sequential", "adm_in_channels": found["label_emb.0.0.weight"][1]}
    if "label_emb.bias" in found:
        return {"num_classes": "continuous"}
    return {"num_classes": found["label_emb.weight"][0] if "label_emb.weight" in found else None}


def _read_transformers(found: Shapes) -> dict[str, Any]:
    if "middle_block.1.transformer_blocks.0.attn2.to_k.weight" not in found:
        return {}
    middle = "middle_block.1"
    return {
        "use_spatial_transformer": True,
        "transformer_depth": 1
        + max(int(key.split(".")[3]) for key in found if key.startswith(f"{middle}.transformer")),
        "context_dim": found[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_in_transformer": len(found[f"{middle}.proj_in.weight"]) == 2,
        "disable_middle_self_attn": _disabled(found, middle),
    }


def _disabled(found: Shapes, place: str) -> bool:
    """Whether the first attention of a transformer looks at something of another width than the map."""
    key = f"{place}.transformer_blocks.0.attn1.to_k.weight"
    return key in found and found[key][0] != found[key][1]
