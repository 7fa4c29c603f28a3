"""The demo's report: the page of `evaluate`, and what only a training and its targets add."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

import carrara
from carrara.app.demo_results import Results
from carrara.evaluation import page
from carrara.evaluation.plots import LineChart, Series, moving_average
from carrara.evaluation.report import (
    Block,
    Code,
    FilmStrip,
    Headlines,
    ImageGrid,
    KeyValues,
    MetricTable,
    Report,
    Section,
)
from carrara.recipe import Recipe


def write_page(results: Results, recipe: Recipe, out: Path, timings: dict[str, float]) -> None:
    """`report.html`: one self-contained page of what is known by now."""
    data = results.data
    measured = page.of_evaluation("guided samples", results.guided, data.held_out, data.train)
    headlines = [metric for metric in results.metrics if metric.reached is not None]
    versions = {"carrara": carrara.__version__, "torch": torch.__version__, "python": platform.python_version()}
    seconds = {name: f"{value:.1f} s" for name, value in timings.items()}
    about: list[Block] = [
        Code("Recipe", recipe.to_yaml()),
        KeyValues("Versions", versions),
        KeyValues("Timings", seconds),
    ]
    sections = [
        Section("In short", [Headlines(headlines)], "Every metric with a target."),
        Section("What the model never saw", [_held_out(results)], "To compare with the samples below."),
        *measured.sections,
        _film(results),
        _training(out, recipe),
        *([_solvers(results)] if results.curves else []),
        Section("Metrics and their protocol", [MetricTable(results.metrics)]),
        Section("Recipe, versions, timings", about),
    ]
    subtitle = (
        "A diffusion model of 8×8 scanned handwriting, trained on 1,437 images and measured against all 1,797 and "
        "the 360 that were held out."
    )
    Report("Handwritten digits", subtitle, sections).write(out / "report.html")


def _held_out(results: Results) -> ImageGrid:
    """Ten held-out images of each digit, a column each."""
    names = [str(digit) for digit in range(10)]
    held_out = results.data.held_out
    assert held_out.pictures is not None
    of_digit = {name: [row for row, own in enumerate(held_out.labels or ()) if own == name] for name in names}
    images = torch.cat(list(held_out.pictures.batches()))
    rows = [of_digit[name][row] for row in range(10) for name in names]
    return ImageGrid("Held-out images", images[rows], 10, "Real digits, one column each.", names)


def _film(results: Results) -> Section:
    noisy, clean, times = results.film
    film = FilmStrip(
        "One picture being denoised",
        noisy,
        clean,
        times,
        "Above the noisy image xₜ, below the clean image x̂₀ that the model predicts, from pure noise to the end.",
    )
    return Section("How a picture comes about", [film])


def _training(out: Path, recipe: Recipe) -> Section:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [float(entry["step"]) for entry in entries]
    raw = [float(entry["loss"]) for entry in entries]
    loss = [
        Series(f"mean of {recipe.training.log_every} steps", steps, raw, faint=True),
        Series("running mean", steps, moving_average(raw, 11)),
    ]
    quarters = [
        _quarter(name, steps, [entry["loss_by_quarter"][quarter] for entry in entries])
        for quarter, name in enumerate(("cleanest quarter of t", "second", "third", "noisiest"))
    ]
    falls = "The training objective. It should fall and flatten; a rise or a jump means that something went wrong."
    tasks = "The same loss, by how noisy the image was. Nearly clean and nearly pure noise are different tasks."
    charts = [
        LineChart("Loss", loss, "step", "loss", falls, log_y=True),
        LineChart("Loss by quarter of t", quarters, "step", "loss", tasks, log_y=True),
    ]
    return Section("Training", charts, f"{recipe.training.steps:,} steps of {recipe.training.batch_size} images.")


def _quarter(name: str, steps: list[float], values: list[Any]) -> Series:
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return Series(name, [step for step, _ in known], moving_average([value for _, value in known], 11))


def _solvers(results: Results) -> Section:
    steps = [float(count) for count in results.curve_steps]
    chart = LineChart(
        "Quality against number of steps",
        [Series(solver, steps, values) for solver, values in results.curves.items()],
        "steps",
        "Fréchet distance",
        f"Raw pixels, {results.curve_samples} unguided samples of one seed to all 1,797 digits: lower is better, and "
        "fewer samples than above read higher. A good solver is low at few steps.",
        log_x=True,
        log_y=True,
    )
    return Section("Which solver, how many steps", [chart])
