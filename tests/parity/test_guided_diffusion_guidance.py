"""condition_mean and condition_score of guided-diffusion, sample by sample, from the stored reference runs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from carrara.condition import Condition
from carrara.guidance import classifier_guidance, static_threshold
from carrara.process import Grid, NetworkDenoiser, Noise, NoisyClassifier, Transition, grids, schedules
from carrara.process.schedules import Schedule
from carrara.solvers import Ancestral
from carrara.solvers.base import bound
from tests.shared import shared

CASES = {
    "c1_linear_fixedlarge_full": "large",
    "c2_linear_learnedrange_25": "learned",
    "c3_cosine_learnedrange_ddim25": "learned",
    "c4_cosine_fixedsmall_sections_rescaled": "small",
    "c5_linear_learnedrange_full": "learned",
    "c6_linear_startx_ddim50": "small",
}


class Silent(Noise):
    """No noise: a step then gives its mean."""

    def normal(self, shape: Any, sub: int = 0, dtype: Any = torch.float32, device: Any = "cpu") -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)


def process(config: dict[str, Any]) -> tuple[Schedule, Grid]:
    make = {"linear": schedules.linear, "cosine": schedules.cosine}[config["schedule"]]
    schedule = make(config["steps"], 1000 / config["steps"] if config["rescale_timesteps"] else 1.0)
    respacing = config["timestep_respacing"]
    if respacing.startswith("ddim"):
        return schedule, grids.ddim(schedule, int(respacing[4:]))
    return schedule, grids.sections(schedule, respacing or str(config["steps"]))


def network(config: dict[str, Any]) -> Any:
    """The analytic model of the notes, told the time that the original's model receives."""

    def call(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        phase = (math.pi / 2 * time / config["time_scale"]).reshape(-1, *[1] * (x.ndim - 1))
        signal, noise = phase.cos(), phase.sin()
        if config["model_mean_type"] == "START_X":
            signal, noise = noise, signal
        raw: Tensor = x * noise + 0.1 * (3 * x).sin() * signal
        if config["model_var_type"] == "LEARNED_RANGE":
            return torch.cat([raw, 0.7 * x.tanh()], dim=1)
        return raw

    return call


def classify(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Logits whose log-softmax for class 0 is Σ 0.2·sin(x) - 40 to all digits: its gradient is 0.2·cos(x)."""
    log_probability = (0.2 * x.sin()).flatten(1).sum(1) - 40
    return torch.stack([log_probability, torch.log1p(-log_probability.exp())], dim=1)


@pytest.mark.parametrize("case", CASES)
def test_condition_mean_and_condition_score(case: str) -> None:
    tensors = load_file(shared("golden", f"{case}.safetensors"))
    spec = json.loads(shared("golden", f"{case}.json").read_text())
    config = spec["config"]
    schedule, grid = process(config)
    predicts = {"EPSILON": "eps", "START_X": "x0"}[config["model_mean_type"]]
    learned = config["model_var_type"] == "LEARNED_RANGE"
    plain = static_threshold()(NetworkDenoiser(network(config), schedule, predicts, learned))  # type: ignore[arg-type]
    asked: list[float] = []

    def spy(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        asked.append(float(time))
        return classify(x, time, condition)

    classifier = NoisyClassifier(spy, schedule)
    by_mean = classifier_guidance(classifier, 1.0, label=0, form="mean")(plain)
    by_score = classifier_guidance(classifier, 1.0, label=0, form="score")(plain)
    times = grid.times.flip(0).tolist()  # times[i] is where spaced index i - 1 starts; times[0] is clean
    solver = Ancestral(variance=CASES[case])  # type: ignore[arg-type]
    wanted = {o["name"]: o for o in spec["outputs"]}
    for row, index in enumerate(tensors["input.t"].tolist()):
        x = tensors["input.x"][row : row + 1].double()
        t, s = times[index + 1], times[index]
        before = times[index + 2] if index + 2 < len(times) else None
        step = solver.step(bound(by_mean, Condition()), Transition.of(schedule, t, s, before), x, None, Silent())
        scored = by_score(x, t, Condition())
        mean = Transition.of(schedule, t, s).posterior_mean(x, scored.x0)
        got = {
            "condition_mean.mean": step.x,
            "condition_score.mean": mean,
            "condition_score.pred_xstart": scored.x0,
        }
        for name, value in got.items():
            about = wanted[name]
            # The README's tolerance: the original's own float32 rounding, row by row.
            tolerance = 4 * about["rounding_rows"][row] + 2e-6 * about["max_abs"]
            gap = float((value[0] - tensors[f"output.{name}"][row]).abs().max())
            assert gap <= tolerance, f"{name}, row {row}: {gap} > {tolerance}"
    expected = tensors["output.cond_timesteps"].double().tolist()
    assert asked[::2] == pytest.approx(expected, abs=1e-4)  # float32 in the original where rescaled
