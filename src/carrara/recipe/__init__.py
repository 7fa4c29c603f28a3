"""A whole run as data: typed, validated, read from YAML. Nothing in a recipe can name code."""

from carrara.recipe.files import load, override, read, shipped, validate
from carrara.recipe.sections import Data, Sampling, Training, Upsampling
from carrara.recipe.whole import (
    ClassifierRecipe,
    CodecRecipe,
    DiffusionRecipe,
    NetworkRecipe,
    Recipe,
    ScorerRecipe,
    json_schema,
)

__all__ = [
    "ClassifierRecipe",
    "CodecRecipe",
    "Data",
    "DiffusionRecipe",
    "NetworkRecipe",
    "Recipe",
    "Sampling",
    "ScorerRecipe",
    "Training",
    "Upsampling",
    "json_schema",
    "load",
    "override",
    "read",
    "shipped",
    "validate",
]
