"""Training objectives with named players, the distributions of their times, and their weights."""

from carrara.objectives.base import Examples, Objective, Terms
from carrara.objectives.classifier import ClassifierObjective
from carrara.objectives.codec import LOSSES, CodecLoss, CodecObjective
from carrara.objectives.diffusion import DiffusionObjective, Loss
from carrara.objectives.times import (
    CleanTimes,
    LogitNormalTimes,
    LogNormalTimes,
    LossAwareTimes,
    TimeSampler,
    UniformTimes,
)
from carrara.objectives.weights import Weight, WeightKind

__all__ = [
    "LOSSES",
    "ClassifierObjective",
    "CleanTimes",
    "CodecLoss",
    "CodecObjective",
    "DiffusionObjective",
    "Examples",
    "LogNormalTimes",
    "LogitNormalTimes",
    "Loss",
    "LossAwareTimes",
    "Objective",
    "Terms",
    "TimeSampler",
    "UniformTimes",
    "Weight",
    "WeightKind",
]
