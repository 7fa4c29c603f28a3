"""Checkpoints of guided-diffusion and improved-diffusion: every constructor option, both directions, bad files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from carrara.condition import Condition
from carrara.convert.recognise import network as recognise
from carrara.interop import guided_diffusion
from carrara.interop.files import read_checkpoint
from carrara.networks import EncoderClassifier, EncoderClassifierParams, UNet, UNetParams
from carrara.presets.published import PUBLISHED
from tests.errors import refused
from tests.interop import adm_reference

BASE: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}
# Every option of the two constructors away from its default at least once, alone and in ADM's combinations.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gray": {"in_channels": 1, "out_channels": 2},
    "other channels out": {"out_channels": 5},
    "deep": {"num_res_blocks": 2, "channel_mult": (1, 1, 2), "attention_resolutions": [2, 4]},
    "fractional width": {"model_channels": 64, "channel_mult": (0.5, 1)},
    "attention everywhere": {"attention_resolutions": {1, 2}},
    "attention nowhere": {"attention_resolutions": (16,)},
    "heads": {"num_heads": 4},
    "heads up": {"num_heads": 4, "num_heads_upsample": 2},
    "head channels": {"num_heads": 3, "num_head_channels": 8, "num_heads_upsample": 5},
    "new order": {"num_heads": 2, "use_new_attention_order": True},
    "scale and shift": {"use_scale_shift_norm": True},
    "residual": {"resblock_updown": True},
    "pooling": {"conv_resample": False},
    "residual and pooling": {"resblock_updown": True, "conv_resample": False},
    "classes": {"num_classes": 5},
    "dropout and checkpoints": {"dropout": 0.2, "use_checkpoint": True},
    "three channels a group": {"model_channels": 96, "channel_mult": (1, 1)},
    "signal": {"dims": 1},
    "volume": {"dims": 3, "num_heads": 2, "attention_resolutions": (1, 2)},
    "volume, residual": {"dims": 3, "resblock_updown": True},
    "volume, pooling": {"dims": 3, "conv_resample": False},
    "ADM": {
        "out_channels": 6,
        "num_classes": 10,
        "num_head_channels": 16,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_new_attention_order": True,
    },
}
POOLS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "attention": {"pool": "attention", "num_head_channels": 16},
    "attention, ADM": {
        "pool": "attention",
        "num_head_channels": 32,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "spatial": {"pool": "spatial", "num_heads": 2, "use_new_attention_order": True},
    "spatial_v2": {"pool": "spatial_v2", "conv_resample": False, "num_heads_upsample": 3},
}


def redraw(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight drawn again, so that no layer that starts at zero hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    drawn = {key: 0.05 * torch.randn(value.shape, generator=generator) for key, value in sorted(state_dict.items())}
    for key, value in drawn.items():
        if value.ndim == 1 and key.endswith("weight"):
            value += 1
        if ".qkv" in key:
            value *= 3
    return drawn


def drawn(network: UNet | EncoderClassifier) -> dict[str, Tensor]:
    return redraw(guided_diffusion.state_dict(network))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor) -> None:
    # float32 through some twenty layers: the stored references move by about 4e-6 of their largest value between
    # kernels; mistakes move them by 2e-4 and more.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_unets_of_every_option_match_the_reference(options: dict[str, Any]) -> None:
    arguments = BASE | options
    weights = drawn(UNet(guided_diffusion.unet_params(**arguments)))
    network = guided_diffusion.load_unet(weights, **arguments).eval()
    dims = arguments.get("dims", 2)
    x = noise(2, arguments["in_channels"], *(3, 8, 8)[-dims:])
    t = torch.tensor([3.0, 731.25])
    y = torch.tensor([1, 4]) if "num_classes" in arguments else None
    with torch.no_grad():
        close(network(x, t, Condition(label=y)), adm_reference.unet(weights, x, t, y, arguments))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_unets_go_back_bit_for_bit_and_tell_their_arguments(options: dict[str, Any]) -> None:
    arguments = BASE | options
    weights = drawn(UNet(guided_diffusion.unet_params(**arguments)))
    network = guided_diffusion.load_unet(weights, **arguments)
    back = guided_diffusion.state_dict(network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    told = guided_diffusion.constructor_arguments(network.params)
    assert guided_diffusion.unet_params(**told) == network.params


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS.keys())
def test_classifiers_of_every_pool_match_the_reference_with_their_gradients(options: dict[str, Any]) -> None:
    arguments = BASE | {"out_channels": 7} | options
    weights = drawn(EncoderClassifier(guided_diffusion.classifier_params(**arguments)))
    network = guided_diffusion.load_classifier(weights, **arguments).eval()
    t = torch.tensor([3.0, 731.25])
    ours, theirs = noise(2, 3, 8, 8).requires_grad_(), noise(2, 3, 8, 8).requires_grad_()
    logits = network(ours, t)
    expected = adm_reference.classifier(weights, theirs, t, arguments)
    close(logits, expected)
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 2].sum(), ours)
    (reference,) = torch.autograd.grad(expected.log_softmax(1)[:, 2].sum(), theirs)
    close(gradient, reference)
    back = guided_diffusion.state_dict(network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    told = guided_diffusion.constructor_arguments(network.params)
    assert guided_diffusion.classifier_params(**told) == network.params


@pytest.mark.parametrize("size", [(4, 4), (2, 4)])
def test_super_resolution_lays_the_enlarged_image_beside_x(size: tuple[int, int]) -> None:
    arguments = BASE | {"out_channels": 6, "num_classes": 4, "resblock_updown": True}
    weights = drawn(UNet(guided_diffusion.super_resolution_params(**arguments)))
    assert weights["input_blocks.0.0.weight"].shape[1] == 6
    network = guided_diffusion.load_super_resolution(weights, **arguments)
    x, small, t, y = noise(2, 3, 8, 8), noise(2, 3, *size), torch.tensor([5.0, 9.0]), torch.tensor([0, 3])
    large = torch.nn.functional.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    with torch.no_grad():
        got = network(x, t, Condition(label=y, concat=small))
    close(got, adm_reference.unet(weights, torch.cat([x, large], 1), t, y, arguments))
    told = guided_diffusion.constructor_arguments(network.params)
    assert guided_diffusion.super_resolution_params(**told) == network.params


def test_half_precision_keeps_norms_embeddings_and_output_in_float32() -> None:
    arguments = BASE | {"use_scale_shift_norm": True, "num_classes": 5}
    weights = drawn(UNet(guided_diffusion.unet_params(**arguments)))
    half = guided_diffusion.load_unet(weights, **arguments, use_fp16=True)
    convolutions = ("in_layers.2", "out_layers.3", "skip_connection", "qkv", "proj_out", ".op", ".conv", "s.0.0")
    for key, value in guided_diffusion.state_dict(half).items():
        torso = key.startswith(("input_blocks", "middle_block", "output_blocks"))
        converted = torso and key.rpartition(".")[0].endswith(convolutions)
        assert value.dtype == (torch.float16 if converted else torch.float32), key
    x, t, y = noise(2, 3, 8, 8), torch.tensor([5.0, 900.0]), Condition(label=torch.tensor([0, 3]))
    with torch.no_grad():
        full = guided_diffusion.load_unet(weights, **arguments)(x, t, y)
        gap = half(x, t, y) - full
    assert gap.dtype == torch.float32
    assert 0 < gap.abs().max() < 0.02 * full.abs().max()  # 11 bits a layer: half of one per mille, summed up


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    weights = drawn(UNet(guided_diffusion.unet_params(**BASE)))
    wrapped = {prefix + key: value for key, value in weights.items()}
    network = guided_diffusion.load_unet(wrapped, **BASE)
    assert torch.equal(guided_diffusion.state_dict(network)["out.2.weight"], weights["out.2.weight"])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_arguments_are_read_from_the_shapes(options: dict[str, Any]) -> None:
    arguments = BASE | options
    params = guided_diffusion.unet_params(**arguments)
    weights = guided_diffusion.state_dict(UNet(params))
    unseen = ["image_size", "num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order"]
    unseen += ["dropout", "use_checkpoint"]
    named = {"num_heads": 1, "use_new_attention_order": False}
    named |= {name: arguments[name] for name in unseen if name in arguments}
    inferred = guided_diffusion.infer_arguments(weights, **named)
    assert guided_diffusion.unet_params(**inferred) == params


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS.keys())
def test_a_classifiers_arguments_are_read_from_the_shapes(options: dict[str, Any]) -> None:
    arguments = BASE | {"out_channels": 7} | options
    params = guided_diffusion.classifier_params(**arguments)
    weights = guided_diffusion.state_dict(EncoderClassifier(params))
    inferred = guided_diffusion.infer_arguments(
        weights,
        image_size=8,
        num_heads=arguments.get("num_heads", 1),
        num_head_channels=arguments.get("num_head_channels", -1),
        use_new_attention_order=arguments.get("use_new_attention_order", False),
    )
    assert guided_diffusion.classifier_params(**inferred) == params


def test_what_shapes_cannot_tell_is_asked_for_by_name() -> None:
    weights = guided_diffusion.state_dict(UNet(guided_diffusion.unet_params(**BASE)))
    with refused("missing", key="image_size"):
        guided_diffusion.infer_arguments(weights)
    with refused("mismatch", key="num_res_blocks"):
        guided_diffusion.infer_arguments(weights, num_res_blocks=5)
    weights["output_blocks.0.0.in_layers.0.bias"] = torch.zeros(7)
    with refused("mismatch", key="output_blocks.0.0.in_layers.0.bias"):
        guided_diffusion.infer_arguments(weights)
    with refused("unsupported", key="input_blocks"):
        guided_diffusion.infer_arguments({"weight": torch.zeros(1)})


PARAMETERS = {  # millions, from the papers' tables (ADM, tables 10-12; Improved DDPM's README)
    "adm-imagenet-64": 296,
    "adm-imagenet-128": 422,
    "adm-imagenet-256": 554,
    "adm-imagenet-512": 559,
    "adm-lsun-256": 553,
    "adm-upsampler-64-256": 312,
    "adm-upsampler-128-512": 309,
    "adm-classifier-64": 65,
    "adm-classifier-128": 43,
    "adm-classifier-256": 54,
    "adm-classifier-512": 54,
    "improved-upsampler-64-256": 280,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size_and_are_recognised(name: str) -> None:
    published = PUBLISHED[name]
    with torch.device("meta"):
        network = published.network()
    weights = guided_diffusion.state_dict(network)
    if name in PARAMETERS:
        assert round(sum(value.numel() for value in weights.values()) / 1e6) == PARAMETERS[name]
    arguments = guided_diffusion.constructor_arguments(published.params)
    make: Any = guided_diffusion.unet_params
    if isinstance(published.params, EncoderClassifierParams):
        make = guided_diffusion.classifier_params
    elif published.params.upsample_concat:
        make = guided_diffusion.super_resolution_params
    assert make(**arguments) == published.params


def test_a_checkpoint_is_recognised_by_its_shapes() -> None:
    with torch.device("meta"):
        weights = guided_diffusion.state_dict(PUBLISHED["improved-cifar10"].network())
    assert recognise(weights) == ("improved-cifar10",)
    weights["label_emb.weight"] = torch.empty(10, 512)
    with refused("unknown", key="label_emb.weight"):
        recognise(weights)


def test_files_that_do_not_fit_name_the_first_key_and_both_shapes() -> None:
    weights = drawn(UNet(guided_diffusion.unet_params(**BASE)))
    with refused("shape", key="time_embed.0.weight"):
        guided_diffusion.load_unet(weights, **BASE | {"model_channels": 64})
    with refused("missing", key="label_emb.weight"):
        guided_diffusion.load_unet(weights, **BASE | {"num_classes": 3})
    with refused("unknown", key="extra"):
        guided_diffusion.load_unet(weights | {"extra": torch.zeros(1)}, **BASE)
    with refused("unknown", key="num_head"):
        guided_diffusion.load_unet(weights, **BASE, num_head=3)
    with refused("invalid", key="attention_resolutions"):
        guided_diffusion.load_unet(weights, **BASE | {"attention_resolutions": "16,8"})
    with refused("missing", key="in_channels"):
        guided_diffusion.load_unet(weights, image_size=8)
    with refused("missing", key="num_head_channels"):
        guided_diffusion.load_classifier(weights, **BASE, pool="attention")


def test_networks_that_the_original_does_not_know_are_not_written() -> None:
    for params, key in (
        (UNetParams(image_size=(8, 8), vector_channels=4, heads=1), "network.vector_channels"),
        (UNetParams(image_size=(8, 8), concat_channels=1, heads=1), "network.concat_channels"),
        (UNetParams(image_size=(8, 8), channels=48, heads=1), "network.norm_groups"),
        (UNetParams(image_size=(8, 8), channels=32, channel_mult=(1, 1, 2)), "network.heads"),
    ):
        with refused("unsupported", key=key):
            guided_diffusion.state_dict(UNet(params))


class Harmful:
    """What a hostile file would hold: a call to be made while it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code from a checkpoint was run",))


def test_bad_files_are_refused_with_a_sentence_and_never_run(tmp_path: Path) -> None:
    weights = {"a": torch.arange(4000.0)}
    for name in ("new.pt", "old.pt", "good.safetensors", "wrapped.ckpt"):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(weights, path)
        elif name == "wrapped.ckpt":
            torch.save({"state_dict": weights, "global_step": 3}, path)
        else:
            torch.save(weights, path, _use_new_zipfile_serialization=name == "new.pt")
        assert torch.equal(read_checkpoint(path).tensors["a"], weights["a"])
        whole = path.read_bytes()
        for length in (0, 1, 9, 200, len(whole) // 2, len(whole) - 9):
            path.write_bytes(whole[:length])
            with refused("damaged", key=str(path)):
                read_checkpoint(path)
    for name in ("harmful.pt", "harmful-old.pt"):
        torch.save({"a": Harmful()}, tmp_path / name, _use_new_zipfile_serialization=name == "harmful.pt")
        with refused("unsupported", key=str(tmp_path / name)):
            read_checkpoint(tmp_path / name)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with refused("unsupported", key=str(tmp_path / "bare.pt")):
        read_checkpoint(tmp_path / "bare.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with refused("invalid", key=str(tmp_path / "list.pt")):
        read_checkpoint(tmp_path / "list.pt")
    with refused("missing", key=str(tmp_path / "absent.pt")):
        read_checkpoint(tmp_path / "absent.pt")
