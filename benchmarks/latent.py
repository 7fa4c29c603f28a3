"""Latent diffusion beside pixel diffusion: images a second of training and of sampling, by each run's own recipe.

    python -m benchmarks.latent LATENT_RUN PIXEL_RUN [--turns 5] [--batch 8] [--steps 20] [--threads 1]

Both take their training steps, and then their walks of `--steps` steps of the solver (without guidance, decoding
included), one after another; medians over the turns, and the ratio of each turn's pair. The latents are drawn from a
cache where the recipe names one, as in training; else encoding every image is a part of the step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.codec_table import speeds, told
from carrara import DiffusionModel, distributed
from carrara.data import Batches, open_source
from carrara.recipe import DiffusionRecipe, load
from carrara.training.diffusion import DiffusionTask
from carrara.training.phases import Phases
from carrara.training.step import Stepper


def training_step(run: Path, batch: int) -> tuple[int, Callable[[], object]]:
    """The number of parameters, and one step from images (or cached latents) to new weights."""
    recipe = load(run / "recipe.yaml")
    assert isinstance(recipe, DiffusionRecipe)
    data = recipe.data
    source = open_source(recipe.data_path(), split=data.split)
    processes = distributed.start()
    task = DiffusionTask(recipe, source, processes)
    prepare = data.preprocess(augment=True)
    batches = task.batches(Batches(source, prepare, recipe.seed, batch))
    stepper = Stepper(task.objective(task.modules), recipe.training, recipe.seed, processes, batch, Phases())
    size = sum(parameter.numel() for parameter in task.modules["network"].parameters())
    draw = Stepper.draws(recipe.seed, torch.arange(batch))

    def step() -> None:
        stepper.step(task.examples(batches.at(0), draw), torch.arange(batch), 0)

    return size, step


def sampling(run: Path, batch: int, steps: int) -> Callable[[], object]:
    """One batch of samples, decoded."""
    model = DiffusionModel.load(run)
    classes = model.class_labels
    labels = None if classes is None else [row % len(classes.names) for row in range(batch)]
    return lambda: model.sample(labels, None if labels else batch, steps=steps, guidance=1.0)


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path)
    for name, default in (("turns", 5), ("batch", 8), ("steps", 20), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = {}
    for run in options.runs:
        size, work[run.name] = training_step(run, options.batch)
        print(f"{run.name}: {size:,} parameters")
    contests = {
        "training": work,
        "sampling": {run.name: sampling(run, options.batch, options.steps) for run in options.runs},
    }
    for what, contestants in contests.items():
        found = speeds(contestants, options.turns, options.batch)
        ratios = [ours / theirs for ours, theirs in zip(*found.values(), strict=True)]
        sides = ", ".join(f"{name} {told(values)}" for name, values in found.items())
        print(f"{what}, images/s: {sides}: ×{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
