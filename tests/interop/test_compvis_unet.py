"""U-Nets of latent diffusion and Stable Diffusion: every constructor option, both directions, bad files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.convert.recognise import latent_unet as recognise
from carrara.errors import Code
from carrara.interop import compvis_unet
from carrara.networks import UNet, UNetParams
from carrara.presets import compvis_published
from carrara.presets.compvis_published import PUBLISHED
from tests.errors import refused
from tests.interop import ldm_reference
from tests.interop.test_guided_diffusion import close, noise, redraw

BASE: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 4,
}
CONTEXT: dict[str, Any] = {"use_spatial_transformer": True, "context_dim": 24}
LEVELS: dict[str, Any] = CONTEXT | {"channel_mult": (1, 2, 2), "attention_resolutions": (1, 2, 4)}
# Every option of the constructor away from its default at least once, alone and in published combinations.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain attention": {},
    "context": CONTEXT,
    "context everywhere": CONTEXT | {"attention_resolutions": [1, 2]},
    "context in the middle only": CONTEXT | {"attention_resolutions": (32, 16)},
    "depth": CONTEXT | {"transformer_depth": 3},
    "linear projection": CONTEXT | {"use_linear_in_transformer": True, "legacy": False},
    "head channels": CONTEXT | {"num_heads": -1, "num_head_channels": 16},
    "head channels, not legacy": CONTEXT | {"num_heads": 3, "num_head_channels": 8, "legacy": False},
    "a list of contexts": CONTEXT | {"context_dim": [24]},
    "heads up mean nothing to transformers": CONTEXT | {"num_heads_upsample": 2},
    "heads up": {"num_heads_upsample": 2},
    "heads up mean nothing without legacy": {"num_heads_upsample": 2, "legacy": False},
    "new order": {"use_new_attention_order": True},
    "scale and shift": CONTEXT | {"use_scale_shift_norm": True},
    "residual": CONTEXT | {"resblock_updown": True},
    "pooling": CONTEXT | {"conv_resample": False},
    "blocks by level": LEVELS | {"num_res_blocks": [2, 1, 3]},
    "pooling, blocks by level": LEVELS | {"num_res_blocks": [2, 1, 3], "conv_resample": False},
    "no attention to itself": LEVELS | {"disable_self_attentions": [True, False, True]},
    "nor in the middle": CONTEXT | {"disable_middle_self_attn": True, "disable_self_attentions": [False, True]},
    "classes": CONTEXT | {"num_classes": 5},
    "continuous": CONTEXT | {"num_classes": "continuous"},
    "sequential": CONTEXT | {"num_classes": "sequential", "adm_in_channels": 10},
    "more channels in": CONTEXT | {"in_channels": 9},
    "twice the channels out": {"out_channels": 8},
    "dropout and checkpoints": CONTEXT | {"dropout": 0.2, "use_checkpoint": True},
    "a kernel's name": CONTEXT | {"spatial_transformer_attn_type": "softmax-xformers"},
    "signal": {"dims": 1},
    "volume": {"dims": 3, "resblock_updown": True},
    "churches": {"attention_resolutions": (1, 2), "use_scale_shift_norm": True, "resblock_updown": True},
}
UNSEEN = ("num_heads", "num_head_channels", "use_new_attention_order", "num_heads_upsample", "legacy", "image_size")
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def weights_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the keys that the reference lists."""
    expected = ldm_reference.expected_shapes(arguments)
    return redraw({key: torch.empty(shape) for key, shape in expected.items()})


def told(arguments: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Condition]:
    """The context, `y`, and both as a condition."""
    context = noise(2, 7, 24) if "context_dim" in arguments else None
    classes = arguments.get("num_classes")
    y = torch.tensor([1, 4]) if isinstance(classes, int) else None
    vector = noise(2, arguments.get("adm_in_channels", 1)) if isinstance(classes, str) else None
    return context, y if vector is None else vector, Condition(label=y, vector=vector, context=context)


@every_option
def test_every_option_matches_the_reference(options: dict[str, Any]) -> None:
    arguments = BASE | options
    weights = weights_of(arguments)
    network = compvis_unet.load_unet(weights, **arguments).eval()
    x = noise(2, arguments["in_channels"], *(3, 8, 8)[-arguments.get("dims", 2) :])
    t = torch.tensor([3.0, 731.25])
    context, y, condition = told(arguments)
    with torch.no_grad():
        close(network(x, t, condition), ldm_reference.unet(weights, x, t, arguments, context, y))


@every_option
def test_every_option_goes_back_bit_for_bit_and_tells_its_arguments(options: dict[str, Any]) -> None:
    arguments = BASE | options
    weights = weights_of(arguments)
    network = compvis_unet.load_unet(weights, **arguments)
    back = compvis_unet.unet_state_dict(network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    assert compvis_unet.unet_params(**compvis_unet.constructor_arguments(network.params)) == network.params
    unseen = {name: arguments[name] for name in (*UNSEEN, "dropout", "use_checkpoint") if name in arguments}
    assert compvis_unet.unet_params(**compvis_unet.infer_arguments(weights, **unseen)) == network.params
    assert compvis_unet.load_unet(weights, **unseen).params == network.params


MILLIONS = {  # what the originals' programs print when they load these models
    "ldm-celebahq-256": 274.06,
    "ldm-imagenet-256-v2": 400.92,
    "ldm-text-1.4b": 872.30,
    "ldm-inpainting": 387.25,
    "stable-diffusion-1": 859.52,
    "stable-diffusion-2": 865.91,
    "stable-diffusion-2-inpainting": 865.93,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_every_key_and_none_too_many(name: str) -> None:
    found = compvis_published.shapes(name)
    assert found == ldm_reference.expected_shapes(PUBLISHED[name])
    if name in MILLIONS:
        assert sum(torch.Size(shape).numel() for shape in found.values()) / 1e6 == pytest.approx(
            MILLIONS[name], abs=6e-3
        )


def test_published_models_are_recognised_by_their_shapes() -> None:
    with torch.device("meta"):
        weights = {k: torch.empty(s) for k, s in ldm_reference.expected_shapes(PUBLISHED["ldm-layout-256"]).items()}
    assert recognise(weights) == ("ldm-layout-256",)
    with_prefix = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    assert recognise(with_prefix) == ("ldm-layout-256",)
    weights["out.2.bias"] = torch.empty(4)
    assert recognise(weights) == ()


@pytest.mark.parametrize("masked", [False, True])
def test_masked_tokens_are_not_seen(masked: bool) -> None:
    arguments = BASE | LEVELS | {"disable_self_attentions": [True, False, True]}
    weights = weights_of(arguments)
    network = compvis_unet.load_unet(weights, **arguments).eval()
    x, t, context = noise(2, 4, 8, 8), torch.tensor([3.0, 400.0]), noise(2, 7, 24)
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7]) if masked else None
    with torch.no_grad():
        got = network(x, t, Condition(context=context, context_mask=mask))
        close(got, ldm_reference.unet(weights, x, t, arguments, context, mask=mask))
        if masked:
            alone = network(x[:1], t[:1], Condition(context=context[:1, :3]))
            close(got[:1], alone)


def test_a_whole_models_checkpoint_gives_its_part_or_its_running_mean() -> None:
    arguments = BASE | CONTEXT
    weights, mean = weights_of(arguments), {k: v + 1 for k, v in weights_of(arguments).items()}
    whole = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    whole |= {"first_stage_model.decoder.conv_in.bias": torch.zeros(1), "betas": torch.zeros(3)}
    network = compvis_unet.load_unet(whole, **arguments)
    assert torch.equal(network.out.weight, weights["out.2.weight"])
    with refused("missing", key="model_ema."):
        compvis_unet.load_unet(whole, ema=True, **arguments)
    whole |= {"model_ema.diffusion_model" + key.replace(".", ""): value for key, value in mean.items()}
    whole |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    network = compvis_unet.load_unet({f"module.{k}": v for k, v in whole.items()}, ema=True, **arguments)
    back = compvis_unet.unet_state_dict(network)
    assert all(torch.equal(back[key], mean[key]) for key in mean)


@pytest.mark.parametrize("null", [False, True])
def test_a_class_embedder_becomes_the_label(null: bool) -> None:
    arguments = BASE | CONTEXT
    weights, table = weights_of(arguments), noise(5, 24)
    whole = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    whole["cond_stage_model.embedding.weight"] = table
    network = compvis_unet.load_unet(whole, class_tokens=True, null_label=null, **arguments).eval()
    assert (network.params.num_classes, network.params.null_label) == (5 - null, null)
    x, t, y = noise(2, 4, 8, 8), torch.tensor([3.0, 400.0]), torch.tensor([1, 4])
    with torch.no_grad():
        got = network(x, t, Condition(label=y))
    close(got, ldm_reference.unet(weights, x, t, arguments, table[y][:, None]))
    with refused("missing", key="cond_stage_model.embedding.weight"):
        compvis_unet.load_unet(weights, class_tokens=True, **arguments)


def test_channels_beside_x_come_from_the_condition() -> None:
    arguments = BASE | CONTEXT | {"in_channels": 9}
    weights = weights_of(arguments)
    network = compvis_unet.load_unet(weights, concat_channels=5, **arguments).eval()
    assert network.params.in_channels == 4
    x, t, context = noise(2, 9, 8, 8), torch.tensor([3.0, 400.0]), noise(2, 7, 24)
    with torch.no_grad():
        got = network(x[:, :4], t, Condition(context=context, concat=x[:, 4:]))
    close(got, ldm_reference.unet(weights, x, t, arguments, context))
    assert compvis_unet.constructor_arguments(network.params)["in_channels"] == 9


@pytest.mark.parametrize("option", ["use_fp16", "use_bf16"])
def test_half_precision_agrees(option: str) -> None:
    arguments = BASE | CONTEXT
    weights = weights_of(arguments)
    half = compvis_unet.load_unet(weights, **arguments, **{option: True}).eval()
    kinds = {
        value.dtype for key, value in compvis_unet.unet_state_dict(half).items() if "to_q" in key or ".conv" in key
    }
    assert kinds == {torch.float16 if option == "use_fp16" else torch.bfloat16}
    x, t, condition = noise(2, 4, 8, 8), torch.tensor([5.0, 900.0]), Condition(context=noise(2, 7, 24))
    with torch.no_grad():
        full = compvis_unet.load_unet(weights, **arguments).eval()(x, t, condition)
        gap = half(x, t, condition) - full
    assert gap.dtype == torch.float32
    # 11 and 8 bits a layer: half of one per mille or 4 per mille, summed up over some twenty layers.
    assert 0 < gap.abs().max() < (0.02 if option == "use_fp16" else 0.12) * full.abs().max()


def test_files_and_arguments_that_do_not_fit_are_named_in_one_sentence() -> None:
    arguments = BASE | CONTEXT
    weights = weights_of(arguments)
    cases: tuple[tuple[dict[str, Any], Code, str], ...] = (
        ({"context_dim": 32}, "shape", "input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"),
        ({"transformer_depth": 2}, "missing", "input_blocks.3.1.transformer_blocks.1.norm1.weight"),
        ({"use_linear_in_transformer": True}, "shape", "input_blocks.3.1.proj_in.weight"),
        ({"num_classes": 3}, "missing", "label_emb.weight"),
        ({"num_clases": 3}, "unknown", "num_clases"),
        ({"num_classes": "sequental"}, "unknown", "num_classes"),
        ({"num_classes": "sequential"}, "missing", "adm_in_channels"),
        ({"num_heads": -1}, "missing", "num_heads"),
        ({"num_heads": 5}, "invalid", "network.heads"),
        ({"n_embed": 512}, "unsupported", "n_embed"),
        ({"num_attention_blocks": [1, 1]}, "unsupported", "num_attention_blocks"),
        ({"disable_self_attentions": [True]}, "mismatch", "disable_self_attentions"),
        ({"context_dim": [24, 32]}, "invalid", "context_dim"),
        ({"use_spatial_transformer": False}, "missing", "use_spatial_transformer"),
        ({"dims": 1}, "unsupported", "dims"),
        ({"concat_channels": 4}, "invalid", "concat_channels"),
    )
    for changes, code, key in cases:
        with refused(code, key=key):
            compvis_unet.load_unet(weights, **arguments | changes)
    with refused("unknown", key="extra"):
        compvis_unet.load_unet(weights | {"extra": torch.zeros(1)}, **arguments)
    with refused("missing", key="num_heads"):
        compvis_unet.load_unet(weights)
    with refused("mismatch", key="input_blocks.3.1.transformer_blocks.1.norm1.weight"):
        compvis_unet.infer_arguments(weights, num_heads=4, transformer_depth=2)
    with refused("unsupported", key="input_blocks"):
        compvis_unet.infer_arguments({"weight": torch.zeros(1)}, num_heads=4)


def test_networks_that_the_original_does_not_know_are_not_written() -> None:
    context = {"context_channels": 8, "transformer_depth": 1, "heads": 1}
    for changes, key in (
        ({"heads": 1, "channels": 48}, "network.norm_groups"),
        ({"channels": 32, "channel_mult": (1, 1, 2)}, "network.heads"),
        (context | {"transformer_depth": (1, 2, 1)}, "network.transformer_depth"),
        ({"transformer_depth": 1, "heads": 1}, "network.context_channels"),
        (context | {"up_heads": 2}, "network.up_heads"),
        ({"heads": 1, "vector_channels": 3}, "network.vector_channels"),
        ({"heads": 1, "learned_variance": True}, "network.learned_variance"),
        (context | {"num_classes": 3, "label_tokens": 1}, "network.label_tokens"),
        ({"heads": 1, "concat_channels": 3, "upsample_concat": True}, "network.upsample_concat"),
    ):
        with torch.device("meta"):
            network = UNet(UNetParams(**changes))
        with refused("unsupported", key=key):
            compvis_unet.unet_state_dict(network)
