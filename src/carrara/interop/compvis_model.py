"""What a whole latent diffusion checkpoint (CompVis) contains in addition to first stage and U-Net: the tables of its
schedule, in and out, and the config that makes the original build it.

The originals' `LatentDiffusion` keeps its schedule as buffers of twelve names, its class embedder under
`cond_stage_model`, and its other choices in a YAML file next to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from carrara.codecs.discrete import DiscreteAutoencoder
from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import LearnedCodec
from carrara.entries import Entry, fixed, read_entries
from carrara.errors import UserError
from carrara.interop import compvis, compvis_unet
from carrara.interop.layout import to_theirs
from carrara.interop.unet_keys import places
from carrara.networks import UNet, UNetParams
from carrara.process import Predicts, schedules
from carrara.process.schedules import Discrete, Schedule

StateDict = Mapping[str, Tensor]

SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
"""Our names of the originals' `beta_schedule`: what they call linear is linear in √β."""
PREDICTS = ("eps", "x0", "v")
"""What `parameterization` may be; the words are ours, too."""
SCHEDULE = {
    "beta_schedule": fixed(*SCHEDULES),
    "linear_start": Entry(float, 1e-4),
    "linear_end": Entry(float, 2e-2),
    "timesteps": Entry(int, None),
}
"""The arguments of the original `LatentDiffusion` about its schedule, with its defaults."""
LEAST_LINEAR = 20
"""DDPM's linear schedule needs more steps: its last β is 20/T."""
ROUNDING = 1e-6
"""How far β may differ, relative to itself, for being stored in float32 (half a unit is 6e-8) by a table made with
another library's arithmetic."""


def schedule(checkpoint: StateDict, arguments: Mapping[str, Any]) -> Discrete:
    """The schedule that a model was trained with: of its arguments, else of its own table.

    Args:
        checkpoint: the whole model's; its `betas` [T] where it has them.
        arguments: of the original `LatentDiffusion`: `beta_schedule`, `linear_start`, `linear_end`, `timesteps`.

    Raises:
        UserError: neither is there, they contradict each other, or the kind is unknown.
    """
    table = checkpoint.get("betas")
    given = {name: value for name, value in arguments.items() if name in SCHEDULE}
    if table is None and not given:
        raise UserError(
            "the checkpoint contains no 'betas' to read its schedule from: name the original's config, or linear_start "
            "and linear_end.",
            key="betas",
            code="missing",
        )
    if table is not None and (table.ndim != 1 or not bool(((table > 0) & (table <= 1)).all())):
        raise UserError("the checkpoint's 'betas' are no noise levels in (0, 1].", key="betas", code="damaged")
    if not given:
        assert table is not None
        return _of_table(table)
    named = _named(given, 1000 if table is None else len(table))
    if table is not None and not _same(named.betas, table):
        raise UserError(
            f"the checkpoint's 'betas' run from {float(table[0]):.3g} to {float(table[-1]):.3g} in {len(table)} steps, "
            f"which is not the {named} of the arguments: leave those of the schedule out.",
            key="betas",
            code="mismatch",
        )
    return named


def _named(arguments: Mapping[str, Any], length: int) -> Discrete:
    a = read_entries(arguments, SCHEDULE, "the config")
    kind, steps = SCHEDULES[a["beta_schedule"]], a["timesteps"] or length
    if kind == "cosine":
        return schedules.cosine(steps)
    make = schedules.scaled_linear if kind == "scaled_linear" else _linear
    return make(steps, a["linear_start"], a["linear_end"])


def _linear(steps: int, start: float, end: float) -> Discrete:
    betas = torch.linspace(start, end, steps, dtype=torch.float64)
    plain = schedules.linear(steps) if steps > LEAST_LINEAR else None
    return plain if plain is not None and _same(plain.betas, betas) else schedules.from_betas(betas)


def _of_table(betas: Tensor) -> Discrete:
    """The schedule of a table, by its formula where one gives these numbers.

    Raises:
        UserError: a table in half precision that no formula gives.
    """
    steps = len(betas)
    formulas: list[Discrete] = [schedules.cosine(steps)]
    for digits in range(1, 7):  # of the ends; the fewest that give the table
        start, end = (float(f"{float(beta):.{digits}g}") for beta in (betas[0], betas[-1]))
        if 0 < start < end < 1:
            formulas.append(schedules.scaled_linear(steps, start, end))
    if steps > LEAST_LINEAR:
        formulas.append(schedules.linear(steps))
    for schedule in formulas:
        if _same(schedule.betas, betas):
            return schedule
    if betas.dtype in (torch.float16, torch.bfloat16):
        raise UserError(
            "the checkpoint's 'betas' are in half precision, too coarse to read a schedule from: name linear_start "
            "and linear_end, or the original's config.",
            key="betas",
            code="missing",
        )
    return schedules.from_betas(betas.double())


def _same(formula: Tensor, table: Tensor) -> bool:
    """Whether a table has a formula's values, up to the rounding of the type that it is stored in."""
    info = torch.finfo(table.dtype) if table.dtype in (torch.float16, torch.bfloat16) else None
    near, least = (info.eps, info.smallest_normal * info.eps) if info else (ROUNDING, 0.0)
    return formula.shape == table.shape and torch.allclose(formula.double(), table.double(), rtol=near, atol=least)


def tables(schedule: Discrete) -> dict[str, Tensor]:
    """The buffers that the original's `register_schedule` makes, float32 [T] each (Ho et al. 2020, eq. 7)."""
    alphas_cumprod, betas = schedule.alphas_cumprod, schedule.betas
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    variance = betas * (1 - before) / (1 - alphas_cumprod)
    found = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod),
    }
    return {name: value.float() for name, value in found.items()}


# The config of the checkpoint


def weights(network: UNet) -> tuple[dict[str, Tensor], Tensor | None]:
    """The U-Net's weights under its own keys, and the class embedder's table [K, context] where classes are its
    context.

    Raises:
        UserError: the network has something that the original does not have.
    """
    compvis_unet.check_exportable(without_classes(network.params))
    theirs = to_theirs(network, places(network))
    table = theirs.pop("label_emb.weight") if network.params.label_tokens else None
    return theirs, table


def without_classes(params: UNetParams) -> UNetParams:
    """The params of the original's U-Net, to which a class that is the context comes from outside."""
    if params.label_tokens != 1:
        return params
    return replace(params, num_classes=None, null_label=False, label_tokens=0)


def config(
    network: UNet, codec: LearnedCodec | None, schedule: Schedule, predicts: Predicts, scale: float
) -> dict[str, Any]:
    """The config that makes the original build a latent diffusion model, as its YAML files have it.

    Args:
        network: the U-Net.
        codec: the first stage; None for a model of pixels.
        schedule, predicts: what it was trained for.
        scale: the latent scale.

    Raises:
        UserError: the model has something that the original does not have.
    """
    p = network.params
    if predicts not in PREDICTS:
        raise UserError(
            f"latent diffusion knows no prediction of '{predicts}', so this model cannot be written.",
            key="predicts",
            code="unsupported",
        )
    conditioning: dict[str, Any] = {"conditioning_key": None, "cond_stage_config": "__is_unconditional__"}
    if p.label_tokens:
        embedder = {"n_classes": p.labels, "embed_dim": p.context_channels, "key": "class_label"}
        described = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": embedder}
        conditioning = {"conditioning_key": "crossattn", "cond_stage_config": described}
    elif p.labels:
        conditioning = {"conditioning_key": "adm", "cond_stage_config": {"target": "torch.nn.Identity"}}
    conditioning |= {"cond_stage_key": "class_label"} if p.labels else {}
    arguments = compvis_unet.constructor_arguments(without_classes(p))
    params = {
        **_schedule_arguments(schedule),
        "parameterization": predicts,
        "first_stage_key": "image",
        "image_size": p.image_size[0],
        "channels": p.in_channels,
        **conditioning,
        "scale_by_std": True,  # the checkpoint holds the number
        "scale_factor": scale,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": arguments},
        "first_stage_config": first_stage_config(codec),
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def first_stage_config(codec: LearnedCodec | None, package: str = "ldm.models.autoencoder") -> dict[str, Any]:
    """The part of such a config that describes the first stage.

    Args:
        codec: the first stage; None for a model of pixels.
        package: where the original's classes are: that, or `taming.models.vqgan`.

    Raises:
        UserError: the codec has something that the original does not have.
    """
    if codec is None:
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    arguments = compvis.constructor_arguments(codec) | {"lossconfig": {"target": "torch.nn.Identity"}}
    if isinstance(codec, DiscreteAutoencoder):
        training = {"kl_weight": 1e-8, "temperature_scheduler_config": {"target": "torch.nn.Identity"}}
        return {"target": "taming.models.vqgan.GumbelVQ", "params": arguments | training}
    if isinstance(codec, KLAutoencoder):
        return {"target": f"{package}.AutoencoderKL", "params": arguments}
    inside = package.startswith("ldm")  # within a latent diffusion model decoding quantises
    return {"target": f"{package}.{'VQModelInterface' if inside else 'VQModel'}", "params": arguments}


def _schedule_arguments(schedule: Schedule) -> dict[str, Any]:
    """The inverse of `_named`.

    Raises:
        UserError: the original cannot make this schedule.
    """
    spec = schedule.spec
    kinds = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if spec["kind"] not in kinds or not isinstance(schedule, Discrete) or schedule.network_scale != 1:
        raise UserError(
            f"latent diffusion cannot make the schedule {schedule}: {', '.join(kinds)} are what it knows, with whole "
            "times.",
            key="schedule",
            code="unsupported",
        )
    steps = len(schedule.alphas_cumprod)
    arguments: dict[str, Any] = {"beta_schedule": kinds[str(spec["kind"])], "timesteps": steps}
    if spec["kind"] == "scaled_linear":
        arguments |= {"linear_start": spec["beta_start"], "linear_end": spec["beta_end"]}
    elif spec["kind"] == "linear":
        arguments |= {"linear_start": 0.1 / steps, "linear_end": 20 / steps}
    return arguments
