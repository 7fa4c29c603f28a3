"""Trained first stages beside each other: what is left of pictures that none of them saw, at what size and speed.

    python -m benchmarks.codec_table RUN... --originals DATA [--split test] [--features classifier=FOLDER]
        [--picture FILE.png] [--columns 10] [--turns 10] [--batch 8] [--threads 1]

Prints a Markdown table. PSNR, SSIM and the Fréchet distance are of the reconstructions against the originals; speeds
are medians over turns in which the contestants take their steps one after another, each as its own recipe trains it,
with all of its players.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from carrara import codecs, distributed
from carrara import images as pictures
from carrara.codecs import LearnedCodec
from carrara.data import open_source
from carrara.evaluation import collected_reference, evaluate, reconstruction
from carrara.evaluation.features import open_features
from carrara.evaluation.latents import measure_latents
from carrara.evaluation.pictures import Pictures, Size, data_pictures, decoded_pictures
from carrara.evaluation.stamp import Measurements
from carrara.objectives import Examples
from carrara.recipe import CodecRecipe, Recipe, load
from carrara.training.codec import CodecTask
from carrara.training.phases import Phases
from carrara.training.step import Stepper

COLUMNS = ("psnr", "ssim", "frechet_distance", "codebook_use", "codebook_perplexity", "latent_bytes")


def originals(path: str, split: str, recipe: Recipe) -> Pictures:
    """The pictures that are taken apart, at the size that the codecs were trained for."""
    return data_pictures(path, split, size=Size(recipe.data.resolution, recipe.data.channels, recipe.data.resize))


def measured(codec: LearnedCodec, name: str, real: Pictures, features: str) -> Measurements:
    """Every figure of one codec."""
    left = decoded_pictures(codec, real, name)
    figures = reconstruction(left, real)
    known = open_features(features)
    return {
        **figures,
        **measure_latents(codec, real, figures["psnr"].stamp),
        **evaluate(left, collected_reference(real, known), known).metrics,
    }


def training_step(recipe: CodecRecipe, images: Tensor) -> Callable[[], object]:
    """One step of everything that learns, the discriminator having begun."""
    task = CodecTask(recipe, open_source(recipe.data_path(), split=recipe.data.split), distributed.start())
    stepper = Stepper(
        task.objective(task.modules), recipe.training, recipe.seed, distributed.start(), len(images), Phases()
    )
    begun = task.loss.start + task.loss.ramp + torch.arange(len(images))
    return lambda: stepper.step(Examples(images), begun, 0)


@torch.no_grad()
def both_ways(codec: LearnedCodec, images: Tensor) -> None:
    codec.decode(codec.encode(images).mode())


def speeds(work: dict[str, Callable[[], object]], turns: int, batch: int) -> dict[str, list[float]]:
    """Images a second in every turn but the first, which warms up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if turn:
                found[name].append(batch / (time.perf_counter() - start))
    return found


def told(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def sheet(found: dict[str, LearnedCodec], real: Pictures, columns: int) -> Tensor:
    """The first pictures, a row of originals and one of what each codec leaves of them."""
    first = range(columns)
    rows = [real.make(first), *(decoded_pictures(codec, real, name).make(first) for name, codec in found.items())]
    return pictures.grid(torch.cat(rows), columns)


def main() -> None:
    """Print the table; write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--originals", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--features", default="pixels")
    parser.add_argument("--picture", type=Path)
    for name, default in (("columns", 10), ("turns", 10), ("batch", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipes = {run.name: load(run / "recipe.yaml") for run in options.runs}
    found = {run.name: cast(LearnedCodec, codecs.load(str(run), "cpu")) for run in options.runs}
    real = originals(options.originals, options.split, next(iter(recipes.values())))
    images = real.make(range(options.batch))
    training = speeds(
        {n: training_step(r, images) for n, r in recipes.items() if isinstance(r, CodecRecipe)},
        options.turns,
        options.batch,
    )
    use = speeds(
        {n: lambda codec=codec: both_ways(codec, images) for n, codec in found.items()},  # type: ignore[misc]
        options.turns,
        options.batch,
    )
    names = [name.replace("_", " ") for name in COLUMNS]
    print(f"| codec | images seen | {' | '.join(names)} | training, images/s | encode + decode, images/s |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for name, codec in found.items():
        figures = measured(codec, name, real, options.features)
        cells = [f"{figures[column].value:.4g}" if column in figures else "" for column in COLUMNS]
        seen = recipes[name].training.steps * recipes[name].training.batch_size
        print(f"| {name} | {seen:,} | {' | '.join(cells)} | {told(training[name])} | {told(use[name])} |")
    print(f"\n{real.count} pictures of {real.name} ({real.split}), features {options.features}.")
    if options.picture is not None:
        pictures.save_png(sheet(found, real, options.columns), options.picture, {"rows": ["original", *found]}, scale=1)


if __name__ == "__main__":
    main()
