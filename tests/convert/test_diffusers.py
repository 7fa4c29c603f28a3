"""Folders of diffusers as models and codecs of Carrara, and back, against diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara import codecs
from carrara.codecs import LearnedCodec
from carrara.condition import Condition
from carrara.convert import Hints, export_model, import_model
from carrara.errors import Code
from carrara.model import DiffusionModel
from carrara.networks import UNet
from carrara.process import schedules
from tests.convert.models import NAMES, TOLD, codec, drawn, model, nothing_left, pictures
from tests.errors import refused

TOLERANCE = 1e-5
"""Float32 of other kernels, over values of order 1."""


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_codec_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    first = codec(kind)
    report = export_model(first, tmp_path / "theirs")
    imported = import_model(tmp_path / "theirs")
    assert imported.report["layout"] == report["layout"] == "diffusers"
    assert imported.report["largest_difference_there_and_back"] == 0
    assert imported.report["fingerprint"] == report["fingerprint"]
    assert imported.report["latent_scale"] == 0.25
    imported.save(tmp_path / "ours")
    again = codecs.load(tmp_path / "ours")
    assert isinstance(again, LearnedCodec)
    assert torch.equal(pictures(again), pictures(first))


@pytest.mark.parametrize("told", [told for told in TOLD if told != "a class as context"])
@pytest.mark.parametrize("kind", ["kl", "vq", None])
def test_a_pipeline_comes_back_and_opens_in_diffusers(told: str, kind: str | None, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    ours = model(told, codec(kind) if kind else None, learned_variance=kind is None)
    export_model(ours, tmp_path / "theirs", "diffusers")
    imported = import_model(tmp_path / "theirs")
    assert imported.report["largest_difference_there_and_back"] == 0
    imported.save(tmp_path / "ours")
    again = DiffusionModel.load(tmp_path / "ours")
    assert torch.equal(pictures(again), pictures(ours))
    assert again.schedule.spec == ours.schedule.spec
    assert again.class_labels == ours.class_labels

    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert isinstance(ours.network, UNet)
    x, t = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8), torch.tensor([37])
    label = None if ours.class_labels is None else torch.tensor([2])
    with torch.no_grad():
        theirs = pipeline.unet(x, t, class_labels=label).sample
        condition = None if label is None else Condition(label=label)
        torch.testing.assert_close(ours.network(x, t, condition), theirs, rtol=TOLERANCE, atol=TOLERANCE)
        if kind is not None:
            decoded = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample
            torch.testing.assert_close(ours.codec.decode(x), decoded, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("latent", [False, True])
def test_a_pipeline_of_diffusers_makes_the_same_pictures_here(latent: bool, tmp_path: Path) -> None:
    """DDIM from the same noise, over the same times: theirs is "leading", from the clean end."""
    import diffusers

    unet: Any = drawn(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        )
    )
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    scheduler: Any = diffusers.DDIMScheduler(**betas, clip_sample=not latent, prediction_type="v_prediction")
    if latent:
        vqvae: Any = drawn(
            diffusers.VQModel(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(16, 32),
                norm_num_groups=8,
                num_vq_embeddings=32,
            )
        )
        pipeline: Any = diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler)
    else:
        pipeline = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path / "theirs")
    ours = import_model(tmp_path / "theirs").model
    assert isinstance(ours, DiffusionModel)
    assert ours.schedule.spec == {"kind": "scaled_linear", "steps": 1000, "beta_start": 0.0015, "beta_end": 0.0195}
    assert ours.predicts == "v"
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    clipped = {} if latent else {"use_clipped_model_output": True}  # as we do; their default mixes clipped and not
    images = pipeline(batch_size=2, generator=generator, num_inference_steps=4, output_type="np", **clipped).images
    start = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    result = ours.sample(count=2, solver="ddim", steps=4, spacing="leading", start=start)
    expected = torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1
    # Four steps and a decoder, each of float32 against another kernel's float32 schedule.
    torch.testing.assert_close(result.images, expected, rtol=1e-4, atol=1e-4)


def test_heads_of_the_legacy_order_are_written_as_diffusers_counts_them(tmp_path: Path) -> None:
    ours = model(qkv_order="legacy", head_channels=16)
    export_model(ours, tmp_path / "theirs")
    again = import_model(tmp_path / "theirs").model
    # Not bit for bit: the channels of q, k and v lie in another order, and sums with them.
    torch.testing.assert_close(pictures(again), pictures(ours), rtol=1e-4, atol=1e-4)


def test_of_a_pipeline_with_text_the_first_stage_is_taken(tmp_path: Path) -> None:
    first = codec()
    export_model(first, tmp_path / "p" / "vae")
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None]}  # type: ignore[list-item]
    write(tmp_path / "p" / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})
    imported = import_model(tmp_path / "p")
    assert "the unet of a StableDiffusionPipeline is conditioned on text" in imported.report["note"]
    assert isinstance(imported.model, LearnedCodec)
    assert torch.equal(pictures(imported.model), pictures(first))


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    export_model(model("a class", codec()), tmp_path / "p")
    unet, scheduler = tmp_path / "p" / "unet", tmp_path / "p" / "scheduler" / "scheduler_config.json"

    index = tmp_path / "p" / "model_index.json"
    weights = unet / "diffusion_pytorch_model.safetensors"

    def no_import(code: Code, key: str, path: Path | None = None, hints: Hints | None = None) -> None:
        with refused(code, key=key):
            import_model(path or tmp_path / "p", hints)

    def changed(path: Path, **changes: Any) -> str:
        """Change entries of a JSON file, and return what it was."""
        text = path.read_text()
        write(path, {**json.loads(text), **changes})
        return text

    no_import("conflict", "--set", hints=Hints(arguments={"a": 1}))
    no_import("unsupported", str(tmp_path / "p" / "unet"), unet)
    no_import("missing", str(tmp_path / "config.json"), tmp_path)
    no_import(
        "unsupported",
        str(weights),
        unet / "diffusion_pytorch_model.safetensors",
    )
    cases: tuple[tuple[Path, dict[str, Any], Code, str], ...] = (
        (scheduler, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "unsupported", "_class_name"),
        (scheduler, {"prediction_type": "flow"}, "unsupported", "prediction_type"),
        (scheduler, {"beta_schedule": "laplace"}, "unsupported", "beta_schedule"),
        (scheduler, {"beta_start": "small"}, "invalid", "beta_start"),
        (unet / "config.json", {"freq_shift": 1}, "unsupported", "freq_shift"),
        (unet / "config.json", {"sample_size": None}, "missing", "sample_size"),
        (unet / "config.json", {"block_out_channels": [32, 128]}, "shape", "down_blocks.1.resnets.0.conv1.weight"),
        (index, {"id2label": {"0": "cat"}}, "mismatch", "id2label"),
        (index, {"bert": ["transformers", "Bert"]}, "unsupported", str(tmp_path / "p")),
        (
            index,
            {"unet": ["diffusers", "UNet3D"], "vqvae": [None, None]},
            "unsupported",
            str(tmp_path / "p"),
        ),
        (tmp_path / "p" / "vqvae" / "config.json", {"latent_channels": 4}, "shape", "encoder.conv_out.weight"),
    )
    for path, changes, code, key in cases:
        text = changed(path, **changes)
        no_import(code, key)
        path.write_text(text)
    content = weights.read_bytes()
    weights.write_bytes(content[:500])
    no_import("damaged", str(weights))
    weights.unlink()
    no_import("missing", str(weights))
    weights.write_bytes(content)
    scheduler.unlink()
    no_import("missing", str(tmp_path / "p" / "scheduler" / "scheduler_config.json"))
    (unet / "config.json").write_text("{")
    no_import("damaged", str(tmp_path / "p" / "unet" / "config.json"), unet)
    codecs.save(codec(), tmp_path / "own")
    no_import("unsupported", str(tmp_path / "own"), tmp_path / "own")
    with refused("unsupported", key=str(tmp_path / "p")):
        DiffusionModel.load(tmp_path / "p")
    with refused("unsupported", key=str(tmp_path / "p" / "vqvae")):
        codecs.load(tmp_path / "p" / "vqvae")
    with refused("unsupported", key=str(weights)):
        DiffusionModel.load(weights)


def test_what_diffusers_cannot_express_is_not_written(tmp_path: Path) -> None:
    per_channel = codec()
    per_channel.set_latent_scale(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.0, 0.0]))
    rescaled = model()
    rescaled.schedule = schedules.cosine(100, network_scale=10)
    flow = model()
    flow.predicts = "flow"
    for thing, key in (
        (model(first=per_channel), "latent_scale"),
        (model("a class as context"), "network.transformer_depth"),
        (rescaled, "schedule"),
        (flow, "predicts"),
        (codec("discrete"), "codec.kind"),
    ):
        with refused("unsupported", key=key):
            export_model(thing, tmp_path / "x", "diffusers")
    assert nothing_left(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with refused("exists", key=str(tmp_path / "x")):
        export_model(codec(), tmp_path / "x")
    assert nothing_left(tmp_path / "x", "mine")


def test_names_of_classes_go_with_the_pipeline(tmp_path: Path) -> None:
    export_model(model("a class"), tmp_path / "p", "diffusers")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert list(index["id2label"].values()) == list(NAMES)
    del index["id2label"]
    (tmp_path / "p" / "carrara.json").unlink()
    write(tmp_path / "p" / "model_index.json", index)
    again = import_model(tmp_path / "p").model
    assert isinstance(again, DiffusionModel)
    assert again.class_labels is not None
    assert again.class_labels.names == ("0", "1", "2", "3")


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
