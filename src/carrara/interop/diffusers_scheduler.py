"""Noise schedules in the layout of diffusers: the entries of a `scheduler_config.json` about training, in and out.

Its class and its other entries choose a sampler, which is no part of a model here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from carrara.entries import Entry, fixed, read_entries
from carrara.errors import UserError, nearest
from carrara.process import Predicts, schedules
from carrara.process.schedules import Discrete, Schedule

CLASSES = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""The schedulers of models that were trained on a table of β."""
FILE = "scheduler_config.json"
"""The file of a pipeline's `scheduler` folder."""
PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
ENTRIES = {
    "num_train_timesteps": Entry(int, 1000),
    "beta_schedule": fixed("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "beta_start": Entry(float, 1e-4),
    "beta_end": Entry(float, 0.02),
    "trained_betas": Entry(tuple[float, ...] | None, None, zero=False),
    "rescale_betas_zero_snr": Entry(bool, False),
    "use_flow_sigmas": fixed(False, None),
    "flow_shift_terminal": fixed(None, False),
}
"""Those of a config that describe the training."""


def read(config: Mapping[str, Any]) -> tuple[Discrete, Predicts]:
    """The schedule and what the network predicts.

    Raises:
        UserError: the scheduler is of another kind, or has an entry that no schedule here can express.
    """
    kind, predicts = str(config.get("_class_name")), str(config.get("prediction_type", "epsilon"))
    if kind not in CLASSES:
        raise UserError(
            f"the scheduler is a {kind}, whose noise levels are no table of β: {nearest(kind, CLASSES)}",
            key="_class_name",
            code="unsupported",
        )
    if "flow" in predicts:
        raise UserError(
            f"the scheduler's prediction_type is '{predicts}': flow models of diffusers cannot be imported.",
            key="prediction_type",
            code="unsupported",
        )
    if predicts not in PREDICTS:
        raise UserError(
            f"the scheduler's prediction_type is '{predicts}': {nearest(predicts, PREDICTS)}",
            key="prediction_type",
            code="unknown",
        )
    c = read_entries(config, ENTRIES, "the scheduler's config", others=True)
    schedule = _table(c)
    return schedules.zero_terminal_snr(schedule) if c["rescale_betas_zero_snr"] else schedule, PREDICTS[predicts]


def _table(c: Mapping[str, Any]) -> Discrete:
    steps, kind, start, end = (c[name] for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"))
    if c["trained_betas"] is not None:
        return schedules.from_betas(c["trained_betas"])
    if kind == "squaredcos_cap_v2":
        return schedules.cosine(steps)
    if kind == "scaled_linear":
        return schedules.scaled_linear(steps, start, end)
    if kind == "sigmoid":
        waves = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        return schedules.from_betas(waves * (end - start) + start)
    if math.isclose(start * steps, 0.1) and math.isclose(end * steps, 20):  # DDPM's own, for any number of steps
        return schedules.linear(steps)
    return schedules.from_betas(torch.linspace(start, end, steps, dtype=torch.float64))


def config(schedule: Schedule, predicts: Predicts, *, pixels: bool, learned_variance: bool) -> dict[str, Any]:
    """The `scheduler_config.json` of a model.

    Args:
        schedule: a table whose network takes whole times.
        predicts: "eps", "x0" or "v".
        pixels: predictions of the clean image may be clipped to [-1, 1].
        learned_variance: the network predicts its reverse variance, which `DDPMScheduler` alone can use.

    Raises:
        UserError: diffusers cannot express it.
    """
    names = {mine: theirs for theirs, mine in PREDICTS.items()}
    if predicts not in names:
        raise UserError(
            f"diffusers' schedulers know no prediction of '{predicts}', so this model cannot be written.",
            key="predicts",
            code="unsupported",
        )
    if not isinstance(schedule, Discrete) or schedule.network_scale != 1:
        raise UserError(
            f"diffusers' schedulers are tables of whole times, which {schedule.spec['kind']} here is not.",
            key="schedule",
            code="unsupported",
        )
    common = {"prediction_type": names[predicts], "clip_sample": pixels, "timestep_spacing": "trailing"}
    if pixels or learned_variance:
        variance = "learned_range" if learned_variance else "fixed_small"
        common |= {"_class_name": "DDPMScheduler", "variance_type": variance}
    else:
        common |= {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}
    return common | _betas(schedule)


def _betas(schedule: Discrete) -> dict[str, Any]:
    """The entries that make diffusers build this table: a formula where it has one, else the β themselves."""
    spec, steps = schedule.spec, len(schedule.alphas_cumprod)
    kind = spec["kind"]
    own: dict[str, Any]
    if kind == "zero_terminal_snr":
        inner = schedules.build(spec["schedule"])  # type: ignore[arg-type]
        assert isinstance(inner, Discrete)
        return _betas(inner) | {"rescale_betas_zero_snr": True}
    if kind == "linear":
        own = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    elif kind == "cosine":
        own = {"beta_schedule": "squaredcos_cap_v2"}
    elif kind == "scaled_linear":
        own = {"beta_schedule": "scaled_linear", "beta_start": spec["beta_start"], "beta_end": spec["beta_end"]}
    else:
        own = {"trained_betas": spec.get("betas") or schedule.betas.tolist()}
    return {"num_train_timesteps": steps, **own}
