"""Latent diffusion's and taming-transformers' checkpoints as models and codecs of Carrara, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from carrara import codecs
from carrara.codecs import LearnedCodec
from carrara.convert import Convertible, Hints, check_outputs, export_model, import_model
from carrara.errors import Code
from carrara.interop import compvis_model, compvis_unet
from carrara.model import DiffusionModel
from carrara.presets import compvis_published, published_codecs
from carrara.process import schedules
from tests.convert.models import CODECS, TOLD, codec, model, nothing_left, pictures, same_weights
from tests.errors import refused
from tests.shared import shared

GOLDEN = {"d2_autoencoder_kl": "decode_mode", "e1_vqmodel": "rec"}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of an exported file, as the original program would read them."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content: dict[str, dict[str, Tensor]] = torch.load(path, weights_only=True)
    return content["state_dict"]


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", CODECS)
def test_a_codec_comes_back_bit_for_bit(kind: str, ending: str, tmp_path: Path) -> None:
    first = codec(kind)
    report = export_model(first, tmp_path / f"first{ending}")
    assert report["layout"] == ("compvis" if kind == "kl" else "taming")
    imported = import_model(tmp_path / f"first{ending}")
    assert imported.report["layout"] == report["layout"]
    assert imported.report["largest_difference_there_and_back"] == 0
    assert imported.report["fingerprint"] == report["fingerprint"]
    assert imported.report["latent_scale"] == 0.25
    imported.save(tmp_path / "folder")
    again = codecs.load(tmp_path / "folder")
    assert isinstance(again, LearnedCodec)
    assert torch.equal(pictures(again), pictures(first))


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("kind", ["kl", "vq", None])
def test_a_latent_model_comes_back_and_makes_the_same_pictures(told: str, kind: str | None, tmp_path: Path) -> None:
    ours = model(told, codec(kind) if kind else None)
    report = export_model(ours, tmp_path / "model.ckpt", "compvis")
    imported = import_model(tmp_path / "model.ckpt")
    assert imported.report["layout"] == "compvis"
    assert imported.report["largest_difference_there_and_back"] == 0
    assert imported.report["fingerprint"] == report["fingerprint"]
    imported.save(tmp_path / "folder")
    again = DiffusionModel.load(tmp_path / "folder")
    assert torch.equal(pictures(again), pictures(ours))
    assert again.schedule.spec == ours.schedule.spec
    assert again.class_labels == ours.class_labels


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", [schedules.cosine(50), schedules.linear(100), schedules.scaled_linear(30)])
def test_schedule_and_prediction_go_with_the_config(schedule: Any, predicts: Any, tmp_path: Path) -> None:
    ours = model(first=codec())
    ours.schedule, ours.predicts = schedule, predicts
    export_model(ours, tmp_path / "model.safetensors")
    again = import_model(tmp_path / "model.safetensors").model
    assert isinstance(again, DiffusionModel)
    assert again.schedule.spec == schedule.spec
    assert again.predicts == predicts


def test_without_its_config_the_checkpoint_tells_what_it_holds(tmp_path: Path) -> None:
    """The schedule by its own table, the latent scale by its own number; heads, sizes and the codec must be said."""
    ours = model("a class as context", codec("vq", scale=0.3), head_channels=16)
    export_model(ours, tmp_path / "model.ckpt")
    config = yaml.safe_load((tmp_path / "model.yaml").read_text())["model"]["params"]
    (tmp_path / "model.yaml").unlink()
    with refused("missing", key="unet_config"):
        import_model(tmp_path / "model.ckpt")
    told = {"unet_config": {"params": {"num_head_channels": 16}}, "first_stage_config": config["first_stage_config"]}
    with refused("missing", key="image_size"):
        import_model(tmp_path / "model.ckpt", Hints(arguments=told))
    told |= {"image_size": 8, "null_label": True}
    again = import_model(tmp_path / "model.ckpt", Hints(arguments=told)).model
    assert torch.equal(pictures(again), pictures(ours))
    assert isinstance(again, DiffusionModel)
    assert again.class_labels is not None
    assert again.class_labels.names == ("0", "1", "2", "3")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> DiffusionModel:
    """A model that passes for a published one: the real ones have hundreds of millions of weights."""
    ours = model("a class as context", codec("kl"))
    network: Any = ours.network
    unet = compvis_unet.constructor_arguments(compvis_model.without_classes(network.params))
    monkeypatch.setitem(compvis_published.PUBLISHED, "small-unet", unet)
    first = compvis_model.first_stage_config(ours.codec)["params"]  # type: ignore[arg-type]
    monkeypatch.setitem(published_codecs.PUBLISHED, "small-kl", first)
    return ours


def whole(ours: DiffusionModel, path: Path) -> dict[str, Tensor]:
    """Its checkpoint as the original's trainer writes it: a running mean, loss networks, counters beside."""
    export_model(ours, path.with_name("exported.ckpt"))
    weights = read(path.with_name("exported.ckpt"))
    unet = {key: value for key, value in weights.items() if key.startswith(compvis_unet.PART)}
    mean = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": 2 * value for key, value in unet.items()}
    extra = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "logvar": torch.zeros(1000),
    }
    return weights | mean | extra


def test_a_published_model_is_known_by_its_shapes_and_its_running_mean_is_taken(
    published: DiffusionModel, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": whole(published, path), "global_step": 5, "optimizer_states": []}, path)
    hints = {"null_label": True}
    mean = import_model(path, Hints(arguments=hints))
    last = import_model(path, Hints(arguments=hints, last_weights=True))
    assert mean.report["recognised"] == ["small-unet"]
    assert mean.report["first_stage"] == ["small-kl"]
    assert mean.report["weights"] == "running mean"
    assert last.report["weights"] == "last"
    assert isinstance(mean.model, DiffusionModel)
    assert isinstance(last.model, DiffusionModel)
    assert torch.equal(pictures(last.model), pictures(published))
    assert torch.equal(2 * published.network.state_dict()["out.weight"], mean.model.network.state_dict()["out.weight"])
    assert mean.model.schedule.spec == published.schedule.spec  # 0.0015 and 0.0195, from a table in float32
    by_name = import_model(path, Hints("small-unet", hints, last_weights=True)).model
    assert isinstance(by_name, DiffusionModel)
    assert same_weights(by_name.network, published.network)


def test_what_waits_for_a_text_or_an_image_gives_its_first_stage(published: DiffusionModel, tmp_path: Path) -> None:
    weights = whole(published, tmp_path / "x.ckpt")
    text = {key: value for key, value in weights.items() if key != compvis_unet.CLASSES}
    text["cond_stage_model.transformer.embeddings.weight"] = torch.zeros(3, 3)
    torch.save(text, tmp_path / "text.ckpt")
    imported = import_model(tmp_path / "text.ckpt")
    assert imported.report["note"] == "only the first stage was imported: the U-Net is conditioned on text"
    assert imported.report["u_net"] == ["small-unet"]
    assert isinstance(imported.model, LearnedCodec)
    assert torch.equal(pictures(imported.model), pictures(published.codec))  # type: ignore[arg-type]

    stem = f"{compvis_unet.PART}input_blocks.0.0.weight"
    torch.save(weights | {stem: torch.zeros(32, 6, 3, 3)}, tmp_path / "concatenated.ckpt")
    assert "conditioned on a concatenated image" in import_model(tmp_path / "concatenated.ckpt").report["note"]
    alone = {key: value for key, value in text.items() if not key.startswith("first_stage_model.")}
    torch.save(alone, tmp_path / "alone.ckpt")
    with refused("unsupported", key=str(tmp_path / "alone.ckpt")):
        import_model(tmp_path / "alone.ckpt")


def test_stable_diffusion_brings_its_own_latent_scale(published: DiffusionModel, tmp_path: Path) -> None:
    """Its first stage has latent diffusion's shapes, so that only the U-Net around it tells whose it is."""
    weights = whole(published, tmp_path / "x.ckpt")
    text = {k: v for k, v in weights.items() if k not in (compvis_unet.CLASSES, "scale_factor")}
    torch.save(text, tmp_path / "text.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compvis_published.PUBLISHED, "stable-diffusion-1", compvis_published.PUBLISHED["small-unet"])
        patch.setattr(compvis_published, "shapes", compvis_published.shapes.__wrapped__)
        small = published_codecs.PUBLISHED["small-kl"] | {"scale_factor": 0.18215}
        patch.setitem(published_codecs.PUBLISHED, "stable-diffusion", small)
        report = import_model(tmp_path / "text.ckpt").report
    assert report["recognised"] == ["stable-diffusion"]
    assert report["latent_scale"] == pytest.approx(0.18215, rel=1e-6)  # kept in float32
    assert import_model(tmp_path / "text.ckpt").report["latent_scale"] == 1


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_first_stages_answer_as_the_originals_did(case: str, tmp_path: Path) -> None:
    path, arguments, answers = original(case, tmp_path)
    imported = import_model(path, Hints(arguments=arguments))
    assert imported.report["largest_difference_there_and_back"] == 0
    assert imported.report["layout"] == ("compvis" if "kl" in case else "taming")
    parity = check_outputs(imported.model, answers)
    assert parity["equal"]
    # Wrong weights show: the check can fail.
    assert isinstance(imported.model, LearnedCodec)
    with torch.no_grad():
        imported.model.decoder.out.weight.mul_(1.01)
    assert not check_outputs(imported.model, answers)["equal"]


def original(case: str, folder: Path) -> tuple[Path, dict[str, Any], Path]:
    """A golden case as its owner would have it: the checkpoint, the arguments, and the original's answers."""
    tensors = load_file(shared("golden", f"{case}.safetensors"))
    arguments = json.loads(shared("golden", f"{case}.json").read_text())["config"]["kwargs"]
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    torch.save({"state_dict": weights}, folder / "first.ckpt")
    out = tensors[f"output.{GOLDEN[case]}"].numpy()
    np.savez(folder / "answers.npz", x=tensors["input.x"].numpy(), out=out)
    return folder / "first.ckpt", arguments, folder / "answers.npz"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    ours = model("a class", codec())
    export_model(ours, tmp_path / "m.ckpt")
    weights, config = read(tmp_path / "m.ckpt"), tmp_path / "m.yaml"
    text = config.read_text()

    def no_import(code: Code, key: str, hints: Hints | None = None, changes: dict[str, Tensor] | None = None) -> None:
        kept = {k: v for k, v in {**weights, **(changes or {})}.items() if v.numel()}
        torch.save(kept, tmp_path / "m.ckpt")
        with refused(code, key=key):
            import_model(tmp_path / "m.ckpt", hints)

    no_import("missing", "out.2.bias", changes={f"{compvis_unet.PART}out.2.bias": torch.zeros(0)})
    no_import("missing", "decoder.conv_out.bias", changes={"first_stage_model.decoder.conv_out.bias": torch.zeros(0)})
    no_import("unknown", "out.3.bias", changes={f"{compvis_unet.PART}out.3.bias": torch.zeros(1)})
    no_import("mismatch", "betas", Hints(arguments={"linear_end": 0.012}))
    no_import("mismatch", "betas", changes={"betas": weights["betas"][:500]})
    no_import("unsupported", "beta_schedule", Hints(arguments={"beta_schedule": "cosin"}))
    no_import("unsupported", "parameterization", Hints(arguments={"parameterization": "velocity"}))
    no_import("mismatch", "classes", Hints(arguments={"classes": ["a", "b"]}))
    no_import("conflict", "--as", Hints("ldm-ffhq-256", config=config))
    no_import("unknown", "linear_begin", Hints(arguments={"linear_begin": 0.1}))
    no_import("invalid", "linear_start", Hints(arguments={"linear_start": "a"}))
    no_import("invalid", "scale_factor", Hints(arguments={"scale_factor": "a"}))
    no_import("invalid", "image_size", Hints(arguments={"image_size": [8, 8, 8]}))
    no_import("invalid", "unet_config", Hints(arguments={"unet_config": 3}))
    no_import("conflict", "--schedule", Hints(schedule="cosine"))
    config.unlink()
    no_import("unknown", "--as", Hints("ldm-fhq-256"))
    no_import("damaged", str(tmp_path / "none.yaml"), Hints(config=tmp_path / "none.yaml"))
    config.write_text("name: digits\n")
    no_import("unsupported", str(tmp_path / "m.yaml"))
    config.write_text("model: [")
    no_import("damaged", str(tmp_path / "m.yaml"))
    config.write_text(text)
    four = {"unet_config": {"params": {"in_channels": 4, "out_channels": 4}}}
    no_import("mismatch", str(tmp_path / "m.ckpt"), Hints(arguments=four), other_ends())
    torch.save({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "u.ckpt")
    with refused("unsupported", key="model.diffusion_model."):
        import_model(tmp_path / "u.ckpt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "u.ckpt")
    with refused("unsupported", key=str(tmp_path / "u.ckpt")):
        import_model(tmp_path / "u.ckpt")


def test_words_of_a_first_stage_are_its_constructors(tmp_path: Path) -> None:
    export_model(codec(), tmp_path / "first.ckpt")
    (tmp_path / "first.yaml").unlink()
    with refused("unknown", key="chanels"):
        import_model(tmp_path / "first.ckpt", Hints(arguments={"chanels": 32}))
    with refused("conflict", key="--last-weights"):
        import_model(tmp_path / "first.ckpt", Hints(last_weights=True))
    with refused("conflict", key="--as"):
        import_model(tmp_path / "first.ckpt", Hints("ldm-kl-f4", {"ddconfig": {"ch": 32}}))


def other_ends() -> dict[str, Tensor]:
    """Ends of a U-Net of four channels."""
    return {
        f"{compvis_unet.PART}input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
        f"{compvis_unet.PART}out.2.weight": torch.zeros(4, 32, 3, 3),
        f"{compvis_unet.PART}out.2.bias": torch.zeros(4),
    }


def test_what_the_originals_cannot_express_is_not_written(tmp_path: Path) -> None:
    per_channel = codec()
    per_channel.set_latent_scale(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.0, 0.0]))
    other = model(first=codec())
    other.schedule = schedules.sigmoid(100)
    cases: tuple[tuple[Convertible, str | None, Code, str], ...] = (
        (per_channel, None, "unsupported", "latent_scale"),
        (model(first=per_channel), None, "unsupported", "latent_scale"),
        (other, None, "unsupported", "schedule"),
        (model(first=codec(), learned_variance=True), None, "unsupported", "network.learned_variance"),
        (codec(norm_groups=8), None, "unsupported", "codec.norm_groups"),
        (codec(channel_mult=(1, 1.5, 2)), None, "unsupported", "codec.norm_groups"),
        (codec(), "taming", "unsupported", "layout"),
        (codec(), "guided-diffusion", "unsupported", "layout"),
        (model(first=codec()), "guided-diffusion", "unsupported", "layout"),
        (codec(), "tamming", "unknown", "layout"),
        (codec("kl", attention=(1,), middle_attention=False), None, "unsupported", "codec.attention"),
    )
    for thing, layout, code, key in cases:
        with refused(code, key=key):
            export_model(thing, tmp_path / "x.ckpt", layout)
    with refused("unsupported", key=str(tmp_path / "x.bin")):
        export_model(codec(), tmp_path / "x.bin")
    assert nothing_left(tmp_path)
