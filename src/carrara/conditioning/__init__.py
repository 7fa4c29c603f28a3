"""From a user's inputs (a digit, a small image) to the slots of a `Condition`: one file for each kind of input."""

from carrara.conditioning.base import (
    KINDS,
    Conditioner,
    DataFacts,
    Input,
    NullForm,
    TrainingInputs,
    WithFiles,
    build,
    count_samples,
    drop,
    encode,
    examples,
    kind_of,
    register,
    settings_of,
    stream,
)
from carrara.conditioning.class_labels import ClassLabels
from carrara.conditioning.low_res import LowRes, NoiseAugmentation, shrink, shrunk_size
from carrara.conditioning.text import Text, TextSettings

register(ClassLabels)
register(LowRes)
register(Text, TextSettings)

__all__ = [
    "KINDS",
    "ClassLabels",
    "Conditioner",
    "DataFacts",
    "Input",
    "LowRes",
    "NoiseAugmentation",
    "NullForm",
    "Text",
    "TextSettings",
    "TrainingInputs",
    "WithFiles",
    "build",
    "count_samples",
    "drop",
    "encode",
    "examples",
    "kind_of",
    "register",
    "settings_of",
    "shrink",
    "shrunk_size",
    "stream",
]
