"""Metrics of quality: features, moments, distances between sets, and the protocol that each metric carries."""

from carrara.evaluation.bootstrap import Interval
from carrara.evaluation.bound import Bound, bits_per_dimension
from carrara.evaluation.clip_score import clip_score, retrieval
from carrara.evaluation.collect import Collected, collect
from carrara.evaluation.evaluator import class_accuracy
from carrara.evaluation.frechet import frechet_distance, frechet_interval
from carrara.evaluation.held_out import measure_held_out
from carrara.evaluation.inception_score import inception_score
from carrara.evaluation.infinity import frechet_infinity
from carrara.evaluation.kernel import kernel_distance
from carrara.evaluation.likelihood import Likelihood, flow_likelihood
from carrara.evaluation.manifold import density_coverage, precision_recall
from carrara.evaluation.memorisation import class_std, class_std_interval, memorisation
from carrara.evaluation.moments import Moments, Statistics
from carrara.evaluation.pairs import likeness, reconstruction
from carrara.evaluation.pictures import Pictures, data_pictures, decoded_pictures, model_pictures
from carrara.evaluation.protocol import METRICS, Evaluation, evaluate
from carrara.evaluation.reference import Reference, collected_reference, read_statistics, write_statistics
from carrara.evaluation.stamp import Measurement, Measurements, Stamp, compare

__all__ = [
    "METRICS",
    "Bound",
    "Collected",
    "Evaluation",
    "Interval",
    "Likelihood",
    "Measurement",
    "Measurements",
    "Moments",
    "Pictures",
    "Reference",
    "Stamp",
    "Statistics",
    "bits_per_dimension",
    "class_accuracy",
    "class_std",
    "class_std_interval",
    "clip_score",
    "collect",
    "collected_reference",
    "compare",
    "data_pictures",
    "decoded_pictures",
    "density_coverage",
    "evaluate",
    "flow_likelihood",
    "frechet_distance",
    "frechet_infinity",
    "frechet_interval",
    "inception_score",
    "kernel_distance",
    "likeness",
    "measure_held_out",
    "memorisation",
    "model_pictures",
    "precision_recall",
    "read_statistics",
    "reconstruction",
    "retrieval",
    "write_statistics",
]
