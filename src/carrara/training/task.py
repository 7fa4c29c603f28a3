"""What a run trains: one task for each kind of recipe. The loop knows no more of it than this."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from carrara.codecs import Codec
from carrara.data import Batch, Batches, LatentBatch, LatentBatches, Source
from carrara.distributed import Processes
from carrara.objectives import Examples, Objective
from carrara.process import Noise
from carrara.recipe import ClassifierRecipe, CodecRecipe, DiffusionRecipe, Recipe, ScorerRecipe
from carrara.training.classifier import ClassifierTask
from carrara.training.codec import CodecTask
from carrara.training.diffusion import DiffusionTask
from carrara.training.scorer import ScorerTask


class Task(Protocol):
    """What a run trains, and what is shown and kept of it.

    Attributes:
        modules: what learns, by the names of the objective's players, with the same first weights on every
            process. Running means are kept of the first.
        summary: what is printed of it once at the start.
        notices: what the user should know before it begins.
        pictures: how many a preview shows; 0 for what makes none.
        codec: in whose latents it works, which no run changes on its way; None on pixels.
    """

    modules: dict[str, nn.Module]
    summary: dict[str, Any]
    notices: list[str]
    pictures: int
    codec: Codec | None

    def batches(self, images: Batches) -> Batches | LatentBatches:
        """What the run reads: the images, or cached latents of them at the same positions."""
        ...

    def objective(self, modules: Mapping[str, nn.Module]) -> Objective:
        """What is minimised, around the modules or what stands for them (spread over processes, averaged)."""
        ...

    def examples(self, batch: Batch | LatentBatch, draw: Noise) -> Examples:
        """What the objective learns from.

        Args:
            draw: the samples' randomness, which the objective takes too: use the draw after it.
        """
        ...

    def blank(self) -> Examples:
        """One black image."""
        ...

    def forward(self, module: nn.Module, examples: Examples) -> Tensor:
        """One forward pass of the first module, as training makes it."""
        ...

    def preview(self, module: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """Some of the pictures that show how far the first module has come: float32 [len(rows), C, H, W], always of
        the same noise, and how they were made."""
        ...

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """Write the finished thing.

        Args:
            module: the first module, whole on this process.
            origin: where its weights come from, in words.
        """
        ...


def make_task(recipe: Recipe, source: Source, processes: Processes) -> Task:
    """The task of the recipe's kind."""
    if isinstance(recipe, DiffusionRecipe):
        return DiffusionTask(recipe, source, processes)
    if isinstance(recipe, ClassifierRecipe):
        return ClassifierTask(recipe, source, processes)
    if isinstance(recipe, CodecRecipe):
        return CodecTask(recipe, source, processes)
    assert isinstance(recipe, ScorerRecipe)
    return ScorerTask(recipe, source, processes)
