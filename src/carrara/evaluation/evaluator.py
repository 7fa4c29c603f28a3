"""Does the picture show the requested class? Predicted by a classifier that never saw a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, mean_interval


@dataclass(frozen=True)
class ClassAccuracy:
    """The fraction of samples for which the evaluator predicts the requested class.

    Attributes:
        fraction: over all samples.
        interval: its bootstrap interval.
        per_class: class -> the fraction over its samples.
        confusion: int64 [K, K], requested (row) against predicted (column).
    """

    fraction: float
    interval: Interval
    per_class: dict[int, float]
    confusion: Tensor


SVC = "SVC(C=10)"


def svc(rows: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """An evaluator: scikit-learn's support vector classifier with C = 10, fitted to real pictures.

    Args:
        rows: [N, D] features of real pictures, or the pictures themselves, [N, C, H, W].
        labels: int64 [N], of two classes at least.

    Returns:
        What predicts the classes, int64 [M], of rows [M, D].
    """
    from sklearn import svm

    fitted = svm.SVC(C=10).fit(rows.flatten(1).numpy(), labels.numpy())
    return lambda samples: torch.from_numpy(fitted.predict(samples.flatten(1).numpy()))


def class_accuracy(predicted: Tensor, requested: Tensor, seed: int = 0) -> ClassAccuracy:
    """Compares predicted classes, int64 [N], with the requested ones, int64 [N].

    Raises:
        UserError: other lengths, or no samples.
    """
    predicted, requested = (torch.as_tensor(labels).long().cpu() for labels in (predicted, requested))
    if predicted.shape != requested.shape or predicted.ndim != 1 or len(predicted) == 0:
        raise UserError(
            f"{list(predicted.shape)} predictions cannot be compared with {list(requested.shape)} labels.",
            key="labels",
            code="shape",
        )
    right = predicted == requested
    classes = int(max(predicted.max(), requested.max())) + 1
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((requested, predicted), torch.ones_like(requested), accumulate=True)
    per_class = {int(label): float(right[requested == label].double().mean()) for label in requested.unique()}
    return ClassAccuracy(float(right.double().mean()), mean_interval(right, seed=seed), per_class, confusion)
