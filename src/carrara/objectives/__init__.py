"""What is minimised: objectives with named players, the times they visit, the weights they give."""

from carrara.objectives.base import Examples, Objective, Terms
from carrara.objectives.diffusion import DiffusionObjective
from carrara.objectives.times import TimeSampler, UniformTimes

__all__ = ["DiffusionObjective", "Examples", "Objective", "Terms", "TimeSampler", "UniformTimes"]
