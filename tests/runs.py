"""Runs small enough for tests."""

from __future__ import annotations

from pathlib import Path

from carrara.recipe import DiffusionRecipe, Recipe, load
from carrara.training import Progress, Trainer

TINY = (
    "network.channels=8",
    "network.channel_mult=[1,1]",
    "network.blocks_per_level=1",
    "network.head_channels=8",
    "training.steps=12",
    "training.batch_size=16",
    "training.warmup=2",
    "training.log_every=4",
    "training.checkpoint_every=5",
    "training.sample_every=12",
    "sampling.steps=2",
    "sampling.count=10",
)


def tiny_recipe(*assignments: str) -> DiffusionRecipe:
    """The shipped recipe `digits`, so small that it trains in a second."""
    recipe = load("digits", [*TINY, *assignments])
    assert isinstance(recipe, DiffusionRecipe)
    return recipe


def train(recipe: Recipe, folder: Path) -> list[Progress]:
    """Train to the end."""
    return list(Trainer(recipe, folder).steps())
