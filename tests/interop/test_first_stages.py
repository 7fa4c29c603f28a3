"""First stages of CompVis and diffusers, in and out: coverage of keys, equal pictures, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carrara.codecs import DiscreteAutoencoder, HierarchicalVAE, KLAutoencoder, LearnedCodec, VQAutoencoder
from carrara.convert.recognise import first_stage as recognise
from carrara.errors import Code
from carrara.interop import compvis, diffusers_codec, diffusers_layout, taming
from carrara.interop.diffusers_folder import OLD_ATTENTION, WEIGHTS
from carrara.presets.published_codecs import PUBLISHED, shapes
from tests.codecs.small import make, params, pictures
from tests.errors import refused
from tests.interop.first_stage_keys import first_stage

Options = dict[str, Any]

SMALL: Options = {
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
}


def shuffled(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew, so that nothing hides behind a zero or a one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight")))
    return module.eval()


def drawn(arguments: Options) -> dict[str, Tensor]:
    """Weights of the original's keys and shapes."""
    torch.manual_seed(0)
    return {key: 0.1 * torch.randn(shape) for key, shape in first_stage(arguments).items()}


# CompVis


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_published_first_stage_is_covered_key_by_key(name: str) -> None:
    """On the meta device: none missing, none unexpected, every shape."""
    assert shapes(name) == first_stage(PUBLISHED[name])


def test_stable_diffusion_has_as_many_keys_and_weights_as_its_file() -> None:
    """The 248 tensors and 83,653,863 numbers that model cards of its VAE give."""
    found = shapes("stable-diffusion")
    assert len(found) == 248
    assert sum(int(torch.tensor(shape).prod()) for shape in found.values()) == 83_653_863


def test_checkpoints_are_recognised() -> None:
    def empty(name: str, prefix: str = "") -> dict[str, Tensor]:
        with torch.device("meta"):
            return {prefix + key: torch.empty(shape) for key, shape in first_stage(PUBLISHED[name]).items()}

    assert recognise(empty("ldm-vq-f8")) == ("ldm-vq-f8",)
    whole = empty("ldm-kl-f8", "first_stage_model.") | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    assert recognise(whole) == ("ldm-kl-f8", "stable-diffusion")
    damaged = empty("ldm-kl-f4")
    del damaged["decoder.conv_out.bias"]
    with refused("unknown", key="decoder.conv_out.bias"):
        recognise(damaged)


@pytest.mark.parametrize("kind", ["kl", "vq", "gumbel"])
def test_compvis_there_and_back(kind: str) -> None:
    arguments: Options = {"embed_dim": 4, "ddconfig": SMALL | {"double_z": kind == "kl"}}
    arguments |= {} if kind == "kl" else {"n_embed": 8}
    arguments |= {"kl_weight": 1e-8} if kind == "gumbel" else {}
    weights = drawn(arguments)
    load = compvis.load_autoencoder if kind != "gumbel" else taming.load_vq
    codec = load(weights, **arguments)
    assert isinstance(codec, {"kl": KLAutoencoder, "vq": VQAutoencoder, "gumbel": DiscreteAutoencoder}[kind])
    back = compvis.state_dict(codec)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_a_first_stage_within_a_whole_checkpoint() -> None:
    arguments: Options = {"embed_dim": 4, "ddconfig": SMALL | {"double_z": True}, "lossconfig": {}}
    weights = drawn(arguments)
    alone = compvis.load_autoencoder(weights | {"loss.logvar": torch.zeros(())}, **arguments)
    whole = {f"first_stage_model.{key}": value for key, value in weights.items()}
    whole |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "first_stage_model.loss.logvar": torch.zeros(())}
    within = compvis.load_autoencoder(whole, **SMALL, embed_dim=4, monitor="val/rec_loss", scale_factor=0.18215)
    x = pictures(size=16)
    with torch.no_grad():
        torch.testing.assert_close(within.encode(x).mode(), 0.18215 * alone.encode(x).mode(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(within.decode(within.encode(x).mode()), alone.decode(alone.encode(x).mode()))


def test_wrong_arguments_and_checkpoints_are_refused() -> None:
    arguments: Options = {"embed_dim": 4, "ddconfig": SMALL | {"double_z": True}}
    weights = drawn(arguments)
    with refused("unknown", key="embeddim"):
        compvis.load_autoencoder(weights, **arguments, embeddim=4)
    with refused("unknown", key="chmult"):
        compvis.load_autoencoder(weights, embed_dim=4, ddconfig=SMALL | {"chmult": (1,)})
    with refused("missing", key="embed_dim"):
        compvis.load_autoencoder(weights, ddconfig=SMALL)
    with refused("unsupported", key="double_z"):
        compvis.load_autoencoder(weights, embed_dim=4, ddconfig=SMALL | {"double_z": False})
    with refused("unsupported", key="remap"):
        taming.load_vq(weights, embed_dim=4, n_embed=8, remap="used.npy", ddconfig=SMALL | {"double_z": False})
    with refused("shape", key="encoder.down.1.block.0.conv1.weight"):
        compvis.load_autoencoder(weights, embed_dim=4, ddconfig=SMALL | {"ch_mult": (1, 3), "double_z": True})
    with refused("missing", key="encoder.conv_in.bias"):
        compvis.load_autoencoder({k: v for k, v in weights.items() if k != "encoder.conv_in.bias"}, **arguments)
    with refused("unknown", key="extra.weight"):
        compvis.load_autoencoder(weights | {"extra.weight": torch.zeros(1)}, **arguments)


def test_what_the_originals_do_not_know_is_not_written() -> None:
    with refused("unsupported", key="codec.norm_groups"):
        compvis.state_dict(make("kl"))
    with refused("unsupported", key="codec.kind"):
        diffusers_codec.state_dict(make("hierarchical"))
    with refused("unsupported", key="codec.tanh"):
        diffusers_codec.state_dict(KLAutoencoder(params(tanh=True)))


# diffusers


def peer_kl(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    chosen: Options = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 48),
        "layers_per_block": 2,
        "norm_num_groups": 8,
    }
    return shuffled(AutoencoderKL(**(chosen | changes)))


def peer_vq(**changes: Any) -> Any:
    from diffusers import VQModel

    chosen: Options = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "latent_channels": 6,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 32,
    }
    return shuffled(VQModel(**(chosen | changes)))


KL_CASES: dict[str, Options] = {
    "as Stable Diffusion": {},
    "without 1×1 maps": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "without attention": {"mid_block_add_attention": False},
    "shifted, as Flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "per channel": {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 1.5], "scaling_factor": 1.0},
    "one channel in, two out": {"in_channels": 1, "out_channels": 2},
}


@pytest.mark.parametrize("case", sorted(KL_CASES))
def test_diffusers_autoencoder_kl(case: str, tmp_path: Path) -> None:
    peer = peer_kl(**KL_CASES[case])
    peer.save_pretrained(tmp_path / "theirs")
    codec = diffusers_layout.load_codec(tmp_path / "theirs")
    assert isinstance(codec, KLAutoencoder)
    c = peer.config
    x = pictures(size=16)[:, : c.in_channels]
    with torch.no_grad():
        theirs = peer.encode(x).latent_dist
        raw = codec.posterior(x)
        # Float32 of other kernels, over values of order 1: the 1e-5.
        torch.testing.assert_close(raw.mean, theirs.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raw.log_variance, theirs.logvar, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raw.kl_to_standard(), theirs.kl(), rtol=1e-5, atol=1e-5)
        mean = torch.tensor(c.latents_mean or [c.shift_factor or 0.0]).reshape(1, -1, 1, 1)
        std = torch.tensor(c.latents_std or [1.0]).reshape(1, -1, 1, 1)
        z = (theirs.mean - mean) * c.scaling_factor / std
        torch.testing.assert_close(codec.encode(x).mode(), z, rtol=1e-5, atol=1e-5)
        # Decoders of random weights magnify roundings; in float64 those of z are left.
        ours, decoded = codec.double().decode(z.double()), peer.double().decode(theirs.mean.double()).sample
        torch.testing.assert_close(ours, decoded, rtol=0, atol=1e-5)
    diffusers_layout.save_codec(codec, tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, peer.state_dict()[key]) for key, value in again.state_dict().items())
    for key in ("latents_mean", "latents_std", "scaling_factor", "shift_factor", "block_out_channels"):
        got, expected = again.config[key], c[key]
        assert got == expected or torch.allclose(torch.tensor(got), torch.tensor(expected)), key


def test_diffusers_vq_model(tmp_path: Path) -> None:
    peer = peer_vq()
    peer.save_pretrained(tmp_path / "theirs")
    codec = diffusers_layout.load_codec(tmp_path / "theirs")
    assert isinstance(codec, VQAutoencoder)
    x = pictures(size=16)
    with torch.no_grad():
        theirs = peer.encode(x).latents
        codes = codec.encode(x)
        torch.testing.assert_close(codes.mode(), theirs * peer.config.scaling_factor, rtol=1e-5, atol=1e-5)
        assert torch.equal(codes.indices.flatten(), peer.quantize(theirs)[2][2].flatten())
        torch.testing.assert_close(codec.decode(codes), peer.decode(theirs).sample, rtol=1e-5, atol=1e-5)
    diffusers_layout.save_codec(codec, tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, peer.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name", ["stable-diffusion", "ldm-kl-f4", "ldm-vq-f4", "ldm-vq-f8", "ldm-vq-f4-noattn"])
def test_published_shapes_are_covered_in_diffusers_own_modules(name: str) -> None:
    """The config that we write makes diffusers build a model of just the keys that we write."""
    from carrara.interop.layout import to_theirs
    from carrara.presets.published_codecs import on_meta

    codec = on_meta(PUBLISHED[name])
    codec.latent_scale, codec.latent_shift = torch.ones(1), torch.zeros(1)  # numbers, which the config asks for
    described = {k: v for k, v in diffusers_codec.config(codec).items() if not k.startswith("_")}
    import diffusers

    with torch.device("meta"):
        peer = getattr(diffusers, diffusers_codec.config(codec)["_class_name"])(**described)
    found = {key: value.shape for key, value in to_theirs(codec, diffusers_codec.places(codec)).items()}
    assert found == {key: value.shape for key, value in peer.state_dict().items()}


def test_old_folders_of_diffusers_are_read(tmp_path: Path) -> None:
    """Before 0.18 attention layers had other names."""
    peer = peer_kl()
    old = {new: before for before, new in OLD_ATTENTION.items()}
    renamed = {}
    for key, value in peer.state_dict().items():
        for new, before in old.items():
            key = key.replace(f".{new}.", f".{before}.") if ".attentions." in key else key
        renamed[key] = value
    assert renamed.keys() != peer.state_dict().keys()
    peer.save_config(tmp_path)
    torch.save(renamed, tmp_path / WEIGHTS[1])
    codec = diffusers_layout.load_codec(tmp_path)
    back = diffusers_codec.state_dict(codec)
    assert all(torch.equal(back[key], value) for key, value in peer.state_dict().items())


def test_other_classes_and_choices_are_refused(tmp_path: Path) -> None:
    def described(**config: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    with refused("missing", key=str(tmp_path / "config.json")):
        diffusers_layout.load_codec(tmp_path)
    with refused("unsupported", key="_class_name"):
        diffusers_layout.load_codec(described(_class_name="UNet2DModel"))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with refused("damaged", key=str(tmp_path / "diffusion_pytorch_model.safetensors")):
        diffusers_layout.load_codec(described(_class_name="AutoencoderKL"))
    cases: tuple[tuple[dict[str, Any], Code, str], ...] = (
        ({"act_fn": "gelu"}, "unsupported", "act_fn"),
        ({"block_out_chanels": [8]}, "unknown", "block_out_chanels"),
        ({"down_block_types": ["DownBlock2D"]}, "unknown", "down_block_types"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "unsupported", "up_block_types"),
    )
    for wrong, code, key in cases:
        with refused(code, key=key):
            diffusers_codec.from_state_dict({}, vq=False, **wrong)


def test_codecs_of_other_kinds_are_not_written(tmp_path: Path) -> None:
    codec: LearnedCodec = HierarchicalVAE([params()])
    with refused("unsupported", key="codec.kind"):
        diffusers_layout.save_codec(codec, tmp_path)
    assert not list(tmp_path.iterdir())
