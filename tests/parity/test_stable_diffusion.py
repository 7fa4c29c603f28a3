"""Whole pipelines of diffusers on random weights: the same prompts and start latents give the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carrara import DiffusionModel
from carrara.convert import import_model
from tests.errors import refused
from tests.text import encoders

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPTS = ["a cat, a dog", "a red car (b)"]
LATENTS = 1e-4
"""float32 over ten steps of a guided network."""
PIXELS = 1 / 255
STEPS = 10
"""A divisor of 1000: at others diffusers' DDIM steps by ⌊1000/S⌋, past its own next timestep."""


def folder(path: Path, *, predicts: str = "epsilon", zero_snr: bool = False, hidden_act: str = "quick_gelu") -> Any:
    """A tiny Stable Diffusion in the real layout, saved by diffusers itself."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    text = encoders.clip(path / "clip", hidden_act=hidden_act)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4) if predicts == "v_prediction" else 4,
        use_linear_projection=predicts == "v_prediction",
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=predicts,
        rescale_betas_zero_snr=zero_snr,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=AutoTokenizer.from_pretrained(path / "clip"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path / "pipeline")
    return pipeline


def imported(path: Path) -> DiffusionModel:
    model = import_model(path / "pipeline").model
    assert isinstance(model, DiffusionModel)
    return model


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
}


@pytest.mark.parametrize("solver", sorted(SCHEDULERS))
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_pipeline_s_pictures(solver: str, guidance: float, predicts: str, tmp_path: Path) -> None:
    pipeline = folder(tmp_path, predicts=predicts, hidden_act="gelu" if predicts == "v_prediction" else "quick_gelu")
    kind, changes = SCHEDULERS[solver]
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    negative = ["a red car", ""] if guidance > 1 else None
    arguments = {"num_inference_steps": STEPS, "guidance_scale": guidance, "negative_prompt": negative}
    texts = ["a cat, a dog", r"a red car"]
    pipeline.scheduler.set_timesteps(STEPS)
    sigma = float(pipeline.scheduler.sigmas.max()) if solver == "euler" else 0.0
    wanted = pipeline(prompt=texts, latents=start.clone(), output_type="latent", **arguments).images
    model = imported(tmp_path)
    # diffusers' Euler multiplies the start by σ_max there, which is not quite √(1 + σ_max²)
    start = start * float(pipeline.scheduler.init_noise_sigma) / (1 + sigma**2) ** 0.5 if solver == "euler" else start
    found = model.sample(prompts=texts, start=start, solver=solver, steps=STEPS, guidance=guidance, negative=negative)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found.latents, wanted, atol=LATENTS * max(scale, 1), rtol=0)
    with torch.no_grad():
        pictures = pipeline.vae.decode(wanted / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(found.images, pictures, atol=PIXELS, rtol=0)


def test_a_folder_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    folder(tmp_path)
    model = imported(tmp_path)
    model.save(tmp_path / "own")
    again = DiffusionModel.load(tmp_path / "own")
    assert torch.equal(again.sample(prompts=PROMPTS, steps=2).latents, model.sample(prompts=PROMPTS, steps=2).latents)
    assert again.sampling["guidance"] == 7.5


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "pipeline" / part).rename(tmp_path / "elsewhere")
    with refused("missing", key=part):
        import_model(tmp_path / "pipeline")


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    encoders.clip(tmp_path / "other", hidden_size=32)
    (tmp_path / "pipeline" / "text_encoder").rename(tmp_path / "elsewhere")
    (tmp_path / "other").rename(tmp_path / "pipeline" / "text_encoder")
    with refused("mismatch", key="text_encoder"):
        import_model(tmp_path / "pipeline")
