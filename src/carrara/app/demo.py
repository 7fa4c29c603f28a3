"""From nothing to a report: train on real handwriting, sample, measure, compare solvers."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from carrara import images as pictures
from carrara.app.demo_page import write_page
from carrara.app.demo_results import Digits, Drawn, Results, film_of, measure
from carrara.app.events import Event, Metrics, Preview, Saved
from carrara.app.request import Request
from carrara.app.sample import drawn
from carrara.app.train import training
from carrara.evaluation import frechet_distance
from carrara.files import write_whole
from carrara.model import DiffusionModel
from carrara.recipe import Recipe, load
from carrara.sampling import Samples
from carrara.training import Trainer

STEPS = 20
"""Solver steps of the measured samples."""

CHANGES = ("training.steps=480", "training.checkpoint_every=240", "training.sample_every=240")
"""To the recipe 'digits': fewer steps, which reach every target."""


class DemoRequest(Request):
    """Where the demo goes.

    Attributes:
        out: the run folder.
        changes: assignments to the recipe 'digits'.
        device: "auto" or a device.
    """

    out: Path = Path("runs/demo")
    changes: tuple[str, ...] = ()
    device: str = "auto"


@dataclass(frozen=True)
class Budget:
    """How much the demo measures.

    Attributes:
        guided: guided samples, the digits in turn.
        unguided: unguided samples, with the labels of as many of the 1,797 digits.
        curve_samples: samples for each solver and number of steps.
        curve_steps: the numbers of steps.
        solvers: the solvers that are compared.
    """

    guided: int = 1000
    unguided: int = 1797
    curve_samples: int = 250
    curve_steps: tuple[int, ...] = (5, 10, 20)
    solvers: tuple[str, ...] = ("ddpm", "ddim", "dpm++2m", "unipc")


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 2)


def demo(request: DemoRequest, budget: Budget | None = None) -> Iterator[Event]:
    """Train, sample, measure; samples and a first report as soon as there are some, the comparison of solvers after.

    Yields:
        The training's events, a `Preview` of the samples, `Metrics` "demo" (`result`: `Results`), saved reports.
    """
    budget, clock, out = budget or Budget(), Clock(), request.out
    with clock.phase("setting up"):
        recipe = load("digits", [*CHANGES, *request.changes])
        trainer = Trainer(recipe, out, device=request.device)
    with clock.phase("training"):
        yield from training(trainer, [])
    if trainer.stopped:
        return
    model, data = DiffusionModel.load(out, trainer.processes.device), Digits.read()
    with clock.phase("sampling"):
        guided_labels = [number % 10 for number in range(budget.guided)]
        guided = yield from _sampled(model, "guided samples", guided_labels)
        pictures.save_npz(out / "samples" / "samples.npz", guided.images, guided.labels)
        sheet = pictures.grid(guided.images[:100], 10)
        pictures.save_png(sheet, out / "samples" / "grid.png", guided.metadata, scale=6)
        yield Preview(guided.images[:100])
        yield Saved("samples", out / "samples" / "grid.png")
        unguided = yield from _sampled(model, "unguided samples", data.labels[: budget.unguided], guidance=1.0)
        pictures.save_npz(out / "samples" / "samples_unguided.npz", unguided.images, unguided.labels)
    with clock.phase("measuring"):
        results = measure(Drawn(guided, unguided), data, film_of(model, STEPS))
    yield Metrics("demo", results.to_json(), results)
    yield _save(results, recipe, out, clock)
    with clock.phase("comparing solvers"):
        curves = yield from _curves(model, data, budget)
    results = replace(results, curves=curves, curve_steps=budget.curve_steps, curve_samples=budget.curve_samples)
    yield _save(results, recipe, out, clock)


def _sampled(model: DiffusionModel, task: str, labels: list[int], **choices: Any) -> Generator[Event, None, Samples]:
    """Samples as files hold them, rounded to 8 bits."""
    arguments = {"labels": labels, "count": len(labels), "steps": STEPS, "seed": 0, **choices}
    samples = yield from drawn(model, task, arguments, batch_size=256)
    return replace(samples, images=pictures.from_uint8(pictures.to_uint8(samples.images)))


def _curves(model: DiffusionModel, data: Digits, budget: Budget) -> Generator[Event, None, dict[str, list[float]]]:
    """Fréchet distance on raw pixels to all digits, by solver, for each number of steps (unguided)."""
    labels = data.labels[: budget.curve_samples]
    curves: dict[str, list[float]] = {}
    for solver in budget.solvers:
        curves[solver] = []
        for steps in budget.curve_steps:
            task = f"{solver} in {steps} steps"
            samples = yield from _sampled(model, task, labels, guidance=1.0, solver=solver, steps=steps)
            curves[solver].append(frechet_distance(samples.images.flatten(1), data.images.flatten(1)))
    return curves


def _save(results: Results, recipe: Recipe, out: Path, clock: Clock) -> Saved:
    """`report.json` and `report.html`, of what is known by now."""
    report = {**results.to_json(), "timings": clock.seconds}
    write_whole(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_page(results, recipe, out, clock.seconds)
    return Saved("report", out / "report.html")
