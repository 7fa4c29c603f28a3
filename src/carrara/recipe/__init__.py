"""A whole run as data: typed, validated, read from YAML. Nothing in a recipe can name code."""

from carrara.recipe.files import load, override, read, shipped, validate
from carrara.recipe.params import params_from
from carrara.recipe.sections import (
    Conditioning,
    Data,
    ObjectiveChoice,
    Sampling,
    ScheduleChoice,
    TimesChoice,
    Training,
    Upsampling,
    WeightChoice,
)
from carrara.recipe.whole import Recipe

__all__ = [
    "Conditioning",
    "Data",
    "ObjectiveChoice",
    "Recipe",
    "Sampling",
    "ScheduleChoice",
    "TimesChoice",
    "Training",
    "Upsampling",
    "WeightChoice",
    "load",
    "override",
    "params_from",
    "read",
    "shipped",
    "validate",
]
