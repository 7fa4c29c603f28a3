"""What the demo finds out about its model, and the pages that show it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import carrara
from carrara.evaluation import class_spread, class_spread_interval, frechet_distance, frechet_interval, memorisation
from carrara.evaluation.bootstrap import mean_interval
from carrara.evaluation.judge import SVC, svc
from carrara.evaluation.plots import LineChart, Series, moving_average
from carrara.evaluation.report import (
    Block,
    Code,
    Figure,
    FigureTable,
    FilmStrip,
    Headlines,
    ImageGrid,
    KeyValues,
    Pairs,
    Report,
    Section,
    SideBySide,
)
from carrara.model import DiffusionModel
from carrara.recipe import Recipe

if TYPE_CHECKING:
    from carrara.cli.demo import Digits, Drawn


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        figures: every figure with its target and protocol.
        curves: Fréchet distance by solver, one value for each of `curve_steps`.
        nearest: index of the training image nearest to each of the first 16 guided samples.
        distances: how far it lies, Euclidean in pixels of [-1, 1].
        film: noisy images, predicted clean images [N, 1, 8, 8] and times of one picture being denoised.
    """

    figures: list[Figure]
    curves: dict[str, list[float]]
    curve_steps: list[int]
    nearest: list[int]
    distances: list[float]
    film: tuple[Tensor, Tensor, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Every figure, as plain data."""
        rows = [
            {
                "name": f.name,
                "value": f.value,
                "unit": f.unit,
                "interval": f.interval,
                "at_least": f.at_least,
                "at_most": f.at_most,
                "reached": f.reached,
                "protocol": f.protocol,
            }
            for f in self.figures
        ]
        curves = {"steps": self.curve_steps, "frechet_distance": self.curves}
        nearest = {"training_image": self.nearest, "distance": self.distances}
        return {"carrara": carrara.__version__, "figures": rows, "solvers": curves, "nearest_of_16": nearest}


def _read_as_asked(judge: Callable[[Tensor], Tensor], images: Tensor, labels: list[int]) -> Tensor:
    """1.0 where the judge reads the digit that was asked for, float64 [N]."""
    return (judge(images) == torch.tensor(labels)).double()


def measure(
    model: DiffusionModel,
    data: Digits,
    drawn: Drawn,
    curves: dict[str, list[float]],
    curve_steps: tuple[int, ...],
    steps: int,
) -> Findings:
    """All figures of the demo."""
    figures = [*_accuracy(data, drawn), *_distances(data, drawn), *_memory(data, drawn)]
    first = drawn.guided[0].images[:16]
    found = memorisation(first, data.train, data.held_out)
    nearest = found.nearest.tolist()
    distances = [float((a - data.train[i]).norm()) for a, i in zip(first, nearest, strict=True)]
    return Findings(figures, curves, list(curve_steps), nearest, distances, film_of(model, steps))


def _protocol(samples: Any, seeds: int) -> str:
    p = samples.metadata
    return (
        f"n = {len(samples.images):,} × {seeds} seeds, {p['solver']}, {p['steps']} steps {p['grid']}, "
        f"guidance {p['guidance']:g}, {p['weights']}, 8-bit pixels"
    )


def _accuracy(data: Digits, drawn: Drawn) -> list[Figure]:
    judge = svc(data.train, data.train_labels)
    figures = []
    for name, target, sets in (("guided", 99.0, drawn.guided), ("unguided", 96.0, drawn.unguided)):
        hits = torch.cat([_read_as_asked(judge, s.images, s.labels or []) for s in sets])
        interval = mean_interval(hits)
        figures.append(
            Figure(
                f"Digits read as asked, {name}",
                100 * float(hits.mean()),
                "%",
                1,
                (100 * interval.low, 100 * interval.high),
                at_least=target,
                protocol=f"judge {SVC} on raw pixels of the training split; {_protocol(sets[0], len(sets))}",
            )
        )
    real = _read_as_asked(judge, data.held_out, data.held_out_labels.tolist())
    figures.append(
        Figure(
            "Digits read rightly, held-out images",
            100 * float(real.mean()),
            "%",
            1,
            protocol="the judge's own limit; n = 360",
        )
    )
    return figures


def _distances(data: Digits, drawn: Drawn) -> list[Figure]:
    reference = data.everything[0].flatten(1)
    values = [frechet_distance(s.images.flatten(1), reference) for s in drawn.unguided]
    interval = frechet_interval(drawn.unguided[0].images.flatten(1), reference)
    spread = (interval.high - interval.low) / 2 / len(values) ** 0.5
    mean = sum(values) / len(values)
    real = frechet_distance(data.train.flatten(1), data.held_out.flatten(1))
    return [
        Figure(
            "Fréchet distance, unguided",
            mean,
            decimals=3,
            interval=(max(0.0, mean - spread), mean + spread),
            at_most=0.40,
            protocol=f"raw pixels (64 dimensions) to all 1,797 digits; {_protocol(drawn.unguided[0], len(values))}",
            comment="not a FID: other features",
        ),
        Figure(
            "Fréchet distance, training to held-out images",
            real,
            decimals=3,
            protocol="raw pixels (64 dimensions), n = 1,437 and 360",
        ),
    ]


def _memory(data: Digits, drawn: Drawn) -> list[Figure]:
    figures = []
    for name, samples in (("guided", drawn.guided[0]), ("unguided", drawn.unguided[0])):
        found = memorisation(samples.images, data.train, data.held_out)
        interval = mean_interval((found.ratios < 1).double())
        figures.append(
            Figure(
                f"Nearer to a training image than its own neighbour, {name}",
                100 * found.share,
                "%",
                1,
                (100 * interval.low, 100 * interval.high),
                at_most=60.0,
                protocol=f"raw pixels, Euclidean; {_protocol(samples, 1)}",
                comment=f"held-out digits {100 * found.held_out_share:.0f} %, copies 100 %",
            )
        )
    guided = drawn.guided[0]
    labels = torch.tensor(guided.labels)
    real = class_spread(*data.everything)
    interval = class_spread_interval(guided.images, labels)
    figures.append(
        Figure(
            "Spread within a class, guided, over the real one",
            class_spread(guided.images, labels) / real,
            decimals=2,
            interval=(interval.low / real, interval.high / real),
            at_least=0.6,
            protocol=f"mean pixel standard deviation within a class; {_protocol(guided, 1)}",
        )
    )
    return figures


def film_of(model: DiffusionModel, steps: int) -> tuple[Tensor, Tensor, list[float]]:
    """One picture (a 3) being denoised: x_t, x̂_0 and t at nine moments."""
    frames: list[tuple[Tensor, Tensor, float]] = []

    grid = model.grid(steps)
    starts = [t for t, _ in grid.pairs()]

    def record(step: Any, low: int) -> None:
        frames.append((step.prediction.x[:1].cpu(), step.prediction.x0[:1].cpu(), starts[step.index]))

    result = model.sample([3], steps=steps, seed=0, on_step=record)
    frames.append((result.images, result.images, 0.0))
    chosen = [frames[round(i * (len(frames) - 1) / 8)] for i in range(9)]
    noisy, clean, times = zip(*chosen, strict=True)
    return torch.cat(noisy), torch.cat(clean), list(times)


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _training_section(out: Path, recipe: Recipe) -> Section:
    entries = _log(out)
    steps = [float(e["step"]) for e in entries]
    raw = [float(e["loss"]) for e in entries]
    blocks: list[Block] = [
        LineChart(
            "Loss",
            [
                Series(f"mean of {recipe.training.log_every} steps", steps, raw, faint=True),
                Series("running mean", steps, moving_average(raw, 11)),
            ],
            "step",
            "loss",
            "The training objective. It should fall and flatten; a rise or a jump means that something went wrong.",
            log_y=True,
        )
    ]
    quarters = [[e["loss_by_quarter"][q] for e in entries] for q in range(4)]
    names = ["cleanest quarter of t", "second", "third", "noisiest"]
    series = []
    for name, values in zip(names, quarters, strict=True):
        known = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        series.append(Series(name, [s for s, _ in known], moving_average([v for _, v in known], 11)))
    blocks.append(
        LineChart(
            "Loss by quarter of t",
            series,
            "step",
            "loss",
            "The same loss, by how noisy the image was. Nearly clean and nearly pure noise are different tasks.",
            log_y=True,
        )
    )
    return Section("Training", blocks, f"{recipe.training.steps:,} steps of {recipe.training.batch_size} images.")


def _pictures_sections(findings: Findings, data: Digits, drawn: Drawn) -> list[Section]:
    names = [str(digit) for digit in range(10)]
    held_out = torch.stack([data.held_out[data.held_out_labels == d][i] for i in range(10) for d in range(10)])
    samples = SideBySide(
        [
            ImageGrid(
                "Samples",
                drawn.guided[0].images[:100],
                10,
                "One column for each digit asked for; none was picked by hand.",
                names,
            ),
            ImageGrid("Held-out images", held_out, 10, "Real digits that the model never saw.", names),
        ]
    )
    first = drawn.guided[0].images[:16]
    pairs = Pairs(
        "Nearest training image of 16 samples",
        first,
        data.train[findings.nearest],
        "sample",
        "nearest training image",
        [f"{distance:.2f}" for distance in findings.distances],
        "The Euclidean distance; 0 would be a copy. Alike in kind, but not the same, is what one hopes for.",
    )
    noisy, clean, times = findings.film
    film = FilmStrip(
        "One picture being denoised",
        noisy,
        clean,
        times,
        "Above the noisy image xₜ, below what the model takes the clean image x̂₀ to be, from pure noise to the end.",
    )
    return [
        Section("Samples", [samples], "What the model draws, beside what it was never shown."),
        Section("Is it memorising?", [pairs], "Each sample beside the training image that is most like it."),
        Section("How a picture comes about", [film]),
    ]


def _solver_section(findings: Findings, n: int) -> Section:
    steps = [float(s) for s in findings.curve_steps]
    chart = LineChart(
        "Quality against number of steps",
        [Series(solver, steps, values) for solver, values in findings.curves.items()],
        "steps",
        "Fréchet distance",
        f"Raw pixels, {n} unguided samples of one seed to all 1,797 digits: lower is better, and fewer samples than "
        "above read higher. A good solver is low at few steps.",
        log_x=True,
        log_y=True,
    )
    return Section("Which solver, how many steps", [chart])


def write_report(
    findings: Findings, data: Digits, drawn: Drawn, recipe: Recipe, out: Path, timings: dict[str, float], n: int
) -> None:
    """`report.html`: one self-contained page.

    Args:
        n: samples behind each point of the solver curves.
    """
    headlines = [figure for figure in findings.figures if figure.reached is not None]
    versions = {"carrara": carrara.__version__, "torch": torch.__version__, "python": platform.python_version()}
    seconds = {name: f"{value:.1f} s" for name, value in timings.items()}
    sections = [
        Section("In short", [Headlines(headlines)], "Every figure with a target."),
        *_pictures_sections(findings, data, drawn),
        _training_section(out, recipe),
        _solver_section(findings, n),
        Section("Figures and their protocol", [FigureTable(findings.figures)]),
        Section(
            "Recipe, versions, timings",
            [Code("Recipe", recipe.to_yaml()), KeyValues("Versions", versions), KeyValues("Timings", seconds)],
        ),
    ]
    subtitle = (
        "A diffusion model of 8×8 scanned handwriting, trained on 1,437 images and measured against all 1,797 and "
        "the 360 that were held out."
    )
    Report("Handwritten digits", subtitle, sections).write(out / "report.html")
