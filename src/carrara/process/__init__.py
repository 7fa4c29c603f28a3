"""The diffusion process: schedules, grids, predictions, transitions, noise and the exact oracle. Tensors only."""

from carrara.condition import Condition
from carrara.process import grids, schedules
from carrara.process.bound import Chain
from carrara.process.denoiser import NetworkDenoiser, NoisyClassifier
from carrara.process.grids import Grid
from carrara.process.noise import GivenNoise, Noise
from carrara.process.oracle import GaussianMixture
from carrara.process.parameterisation import Predicts
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Schedule
from carrara.process.transitions import Gaussian, ReverseVariance, Transition, diffuse, forward, marginal, posterior

__all__ = [
    "Chain",
    "Condition",
    "Denoiser",
    "Gaussian",
    "GaussianMixture",
    "GivenNoise",
    "Grid",
    "Guide",
    "NetworkDenoiser",
    "Noise",
    "NoisyClassifier",
    "Prediction",
    "Predicts",
    "ReverseVariance",
    "Schedule",
    "Transition",
    "diffuse",
    "forward",
    "grids",
    "marginal",
    "posterior",
    "schedules",
]
