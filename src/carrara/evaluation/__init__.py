"""Figures of quality: features, moments, distances between sets, and the protocol each figure carries."""

from carrara.evaluation.bootstrap import Interval
from carrara.evaluation.frechet import frechet_distance, frechet_interval
from carrara.evaluation.inception_score import inception_score
from carrara.evaluation.kernel import kernel_distance
from carrara.evaluation.manifold import density_coverage, precision_recall
from carrara.evaluation.memorisation import class_spread, class_spread_interval, memorisation
from carrara.evaluation.moments import Moments, Statistics

__all__ = [
    "Interval",
    "Moments",
    "Statistics",
    "class_spread",
    "class_spread_interval",
    "density_coverage",
    "frechet_distance",
    "frechet_interval",
    "inception_score",
    "kernel_distance",
    "memorisation",
    "precision_recall",
]
