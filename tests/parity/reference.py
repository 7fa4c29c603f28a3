"""Reading the stored reference runs, and the analytic networks that they were made with."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from carrara.condition import Condition
from carrara.process import Grid, NetworkDenoiser, ReverseVariance, grids, schedules
from carrara.process.schedules import Discrete
from tests.shared import shared

GUIDED_DIFFUSION_CASES = (
    "c1_linear_fixedlarge_full",
    "c2_linear_learnedrange_25",
    "c3_cosine_learnedrange_ddim25",
    "c4_cosine_fixedsmall_sections_rescaled",
    "c5_linear_learnedrange_full",
    "c6_linear_startx_ddim50",
)


@dataclass(frozen=True)
class Reference:
    """One stored case: its settings, inputs and outputs; floating-point tensors are given in float64."""

    name: str

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(shared("golden", f"{self.name}.safetensors"))

    @cached_property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(shared("golden", f"{self.name}.json").read_text())
        return spec

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.spec["config"]
        return config

    def _wide(self, key: str) -> Tensor:
        value = self.tensors[key]
        return value.double() if value.is_floating_point() else value

    def input(self, name: str) -> Tensor:
        return self._wide(f"input.{name}")

    def output(self, name: str) -> Tensor:
        return self._wide(f"output.{name}")

    def has(self, name: str) -> bool:
        return f"output.{name}" in self.tensors

    def tolerance(self, name: str) -> Tensor | float:
        """What the reference's README asks for, 4·rounding + 2e-6·max_abs; per row where it gives rows."""
        entry = next(o for o in self.spec["outputs"] if o["name"] == name)
        largest = float(entry.get("max_abs", self.output(name).abs().max()))
        if "rounding_rows" not in entry:
            return 4 * float(entry.get("rounding", 0.0)) + 2e-6 * largest
        rows = torch.tensor(entry["rounding_rows"], dtype=torch.float64)
        reference = self.output(name)
        # Per row of axis 0, or per column of the bound's [images, steps].
        shape = (-1, *[1] * (reference.ndim - 1)) if len(rows) == len(reference) else (1, -1)
        return (4 * rows + 2e-6 * largest).reshape(shape)

    def check(self, name: str, value: Tensor) -> None:
        """Assert that `value` is the stored output up to its tolerance."""
        reference = self.output(name)
        assert value.shape == reference.shape, name
        excess = (value - reference).abs() - self.tolerance(name)
        assert float(excess.max()) <= 0, f"{self.name} {name}: {float(excess.max())} over the tolerance"


class GuidedDiffusion(Reference):
    """A stored run of guided-diffusion's process."""

    @cached_property
    def schedule(self) -> Discrete:
        make = {"linear": schedules.linear, "cosine": schedules.cosine}[self.config["schedule"]]
        steps = self.config["steps"]
        return make(steps, 1000 / steps if self.config["rescale_timesteps"] else 1.0)

    @cached_property
    def grid(self) -> Grid:
        respacing = self.config["timestep_respacing"]
        return grids.sections(self.schedule, respacing or str(self.config["steps"]))

    @property
    def variance(self) -> ReverseVariance:
        kinds: dict[str, ReverseVariance] = {
            "FIXED_LARGE": "large",
            "FIXED_SMALL": "small",
            "LEARNED_RANGE": "learned",
        }
        return kinds[self.config["model_var_type"]]

    @property
    def learned(self) -> bool:
        return self.variance == "learned"

    def network(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The analytic model of the notes, told the time that the original's model receives."""
        phase = (math.pi / 2 * time / self.config["time_scale"]).reshape(-1, *[1] * (x.ndim - 1))
        signal, noise = phase.cos(), phase.sin()
        if self.config["model_mean_type"] == "START_X":
            signal, noise = noise, signal
        raw: Tensor = x * noise + 0.1 * (3 * x).sin() * signal
        return torch.cat([raw, 0.7 * x.tanh()], dim=1) if self.learned else raw

    @property
    def denoiser(self) -> NetworkDenoiser:
        predicts = "eps" if self.config["model_mean_type"] == "EPSILON" else "x0"
        return NetworkDenoiser(self.network, self.schedule, predicts, self.learned)  # type: ignore[arg-type]

    def pair_index(self, spaced: Tensor) -> Tensor:
        """Our pair (walking order) of guided-diffusion's spaced index."""
        return len(self.grid) - 1 - spaced
