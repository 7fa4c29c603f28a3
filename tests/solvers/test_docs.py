"""The solver that docs/solvers.md writes from scratch, as it stands there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from carrara.process import GaussianMixture, Noise, Transition, grids, schedules
from carrara.solvers import SOLVERS, Solver, Step, UniPC, solve
from tests.shared import ROOT

TEXT = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")


def midpoint() -> Solver:
    source = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "class Midpoint" in block)
    names: dict[str, Any] = {"dataclass": dataclass, "Transition": Transition, "Step": Step}
    exec(source, names)
    solver: Solver = names["Midpoint"]()
    return solver


def test_the_solver_of_the_page_is_of_second_order() -> None:
    schedule = schedules.linear(1000)
    mixture = GaussianMixture([0.5, 0.5], torch.tensor([[0.8, 0.1], [-0.6, 0.4]]), [0.2, 0.3])
    denoiser, steps = mixture.denoiser(schedule), (20, 40, 80)
    x = Noise(1).normal((8, 2), dtype=torch.float64)
    ends = torch.linspace(-3, 3, max(steps) * 8 + 1, dtype=torch.float64)
    fine = solve(denoiser, schedule, UniPC(order=3), grids.given(schedule, schedule.time_at(ends)), x)
    errors = []
    for n in steps:
        places = torch.linspace(-3, 3, n + 1, dtype=torch.float64)
        found = solve(denoiser, schedule, midpoint(), grids.given(schedule, schedule.time_at(places)), x)
        errors.append(float((found - fine).abs().mean()))
    assert -float(np.polyfit(np.log(steps), np.log(errors), 1)[0]) >= 2 - 0.15


def test_the_page_names_every_word() -> None:
    table = TEXT[TEXT.index("## What each assumes") : TEXT.index("## Error against evaluations")]
    assert set(SOLVERS) <= set(re.findall(r"`([^`]+)`", table))
