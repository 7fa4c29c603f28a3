"""The diffusion process: schedules, grids, predictions, transitions, noise and the exact oracle. Tensors only."""

from carrara.condition import Condition
from carrara.process import grids, schedules
from carrara.process.denoiser import NetworkDenoiser, NoisyClassifier, Predicts
from carrara.process.grids import Grid
from carrara.process.noise import GivenNoise, Noise
from carrara.process.oracle import GaussianMixture
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Schedule
from carrara.process.transitions import Pair, diffuse

__all__ = [
    "Condition",
    "Denoiser",
    "GaussianMixture",
    "GivenNoise",
    "Grid",
    "Guide",
    "NetworkDenoiser",
    "Noise",
    "NoisyClassifier",
    "Pair",
    "Prediction",
    "Predicts",
    "Schedule",
    "diffuse",
    "grids",
    "schedules",
]
