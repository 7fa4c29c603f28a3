"""`carrara demo`: train on real handwriting, sample, measure, and write a report worth looking at."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from carrara.cli.demo_report import Findings
    from carrara.model import DiffusionModel
    from carrara.sampling import Samples

STEPS = 20
"""Solver steps of the measured samples."""


@dataclass(frozen=True)
class Plan:
    """How much the demo measures.

    Attributes:
        guided: guided samples for each seed, the digits in turn.
        unguided: unguided samples for each seed, with the labels of as many of the 1,797 digits.
        seeds: sampling seeds over which the figures are averaged.
        curve_samples: samples for each solver and number of steps.
        curve_steps: the numbers of steps.
        solvers: the solvers that are compared.
    """

    guided: int = 1000
    unguided: int = 1797
    seeds: tuple[int, ...] = (0, 1, 2)
    curve_samples: int = 500
    curve_steps: tuple[int, ...] = (5, 10, 20, 50)
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
        self.seconds[name] = round(time.perf_counter() - began, 2)


def demo(
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs/demo"),
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe 'digits', e.g. training.steps=500."),
    ] = None,
) -> None:
    """Train on 1,437 scanned digits, sample, measure, and write report.html: a few minutes on two cores."""
    from carrara.cli.console import console

    findings = make_demo(out, assignments or [], Plan())
    for figure in findings.figures:
        verdict = {True: "reached", False: "MISSED", None: ""}[figure.reached]
        console.print(f"{figure.name}: {figure.value_text} {figure.unit} {verdict}", highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False)


def make_demo(out: Path, assignments: list[str], plan: Plan) -> Findings:
    """Everything that `carrara demo` does, into the run folder `out`."""
    from carrara.app.train import training
    from carrara.cli.demo_report import measure, write_report
    from carrara.cli.train import show_training
    from carrara.files import write_whole
    from carrara.model import DiffusionModel
    from carrara.recipe import load
    from carrara.training import Trainer

    clock = Clock()
    with clock.phase("setting up"):
        recipe = load("digits", assignments)
        trainer = Trainer(recipe, out)
    with clock.phase("training"):
        show_training(training(trainer, []))
    model = DiffusionModel.load(out)
    data = Digits.read()
    with clock.phase("sampling"):
        samples = draw(model, data, plan, out / "samples")
    with clock.phase("comparing solvers"):
        curves = compare_solvers(model, data, plan)
    with clock.phase("measuring"):
        findings = measure(model, data, samples, curves, plan.curve_steps, STEPS)
    report: dict[str, Any] = {**findings.to_json(), "timings": clock.seconds}
    write_whole(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_report(findings, data, samples, recipe, out, clock.seconds, plan.curve_samples)
    return findings


@dataclass(frozen=True)
class Digits:
    """The digits: float32 [N, 1, 8, 8] in [-1, 1], labels int64 [N]; to train on, held out, and both."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor

    @classmethod
    def read(cls) -> Digits:
        """All of them, in the data set's own order."""
        import torch

        from carrara.data import Batches, Preprocess, open_source

        parts: list[Tensor] = []
        for split in ("train", "test"):
            source = open_source("digits", split)
            batch = Batches(source, Preprocess(8, 8, 1), batch_size=len(source)).at(0)
            order = torch.tensor([int(name.rsplit("/", 1)[1]) for name in batch.names]).argsort()
            assert batch.label is not None
            parts += [batch.images[order], batch.label[order]]
        return cls(*parts)

    @property
    def everything(self) -> tuple[Tensor, Tensor]:
        """Images and labels of both splits."""
        import torch

        return torch.cat([self.train, self.held_out]), torch.cat([self.train_labels, self.held_out_labels])


@dataclass(frozen=True)
class Drawn:
    """The samples of every seed, as the files hold them (8 bits a pixel), guided and not."""

    guided: list[Samples]
    unguided: list[Samples]


def draw(model: DiffusionModel, data: Digits, plan: Plan, folder: Path) -> Drawn:
    """Sample every seed; the first seed's go to `folder` as samples.npz, samples_unguided.npz and grid.png."""
    from carrara import images as pictures

    guided_labels = [i % 10 for i in range(plan.guided)]
    real_labels = data.everything[1].tolist()[: plan.unguided]
    drawn = Drawn([], [])
    for seed in plan.seeds:
        drawn.guided.append(_as_saved(model.sample(guided_labels, steps=STEPS, seed=seed)))
        drawn.unguided.append(_as_saved(model.sample(real_labels, steps=STEPS, guidance=1.0, seed=seed)))
    first, plain = drawn.guided[0], drawn.unguided[0]
    pictures.save_npz(folder / "samples.npz", first.images, first.labels)
    pictures.save_npz(folder / "samples_unguided.npz", plain.images, plain.labels)
    sheet = pictures.grid(first.images[:100], 10)
    pictures.save_png(sheet, folder / "grid.png", first.metadata, scale=6)
    return drawn


def _as_saved(samples: Samples) -> Samples:
    """The samples rounded to 8 bits, so that what is measured is what the files hold."""
    from dataclasses import replace

    from carrara import images as pictures

    return replace(samples, images=pictures.from_uint8(pictures.to_uint8(samples.images)))


def compare_solvers(model: DiffusionModel, data: Digits, plan: Plan) -> dict[str, list[float]]:
    """Fréchet distance on raw pixels to all digits, by solver, for each number of steps (unguided)."""
    from carrara.evaluation import frechet_distance

    images, labels = data.everything
    chosen = labels.tolist()[: plan.curve_samples]
    reference = images.flatten(1)
    curves: dict[str, list[float]] = {}
    for solver in plan.solvers:
        made = [model.sample(chosen, steps=n, solver=solver, guidance=1.0, seed=0) for n in plan.curve_steps]
        curves[solver] = [frechet_distance(samples.images.flatten(1), reference) for samples in made]
    return curves
