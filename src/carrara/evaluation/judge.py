"""Does the picture show the class that was asked for? Read by a judge that never saw a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, mean_interval


@dataclass(frozen=True)
class ClassAccuracy:
    """The share of samples that the judge reads as the class asked for.

    Attributes:
        share: over all samples.
        interval: its bootstrap interval.
        per_class: class -> the share over its samples.
        confusion: int64 [K, K], asked (row) against read (column).
    """

    share: float
    interval: Interval
    per_class: dict[int, float]
    confusion: Tensor


SVC = "SVC(C=10)"


def svc(rows: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A judge: scikit-learn's support vector classifier with C = 10, fitted to real pictures.

    Args:
        rows: [N, D] features of real pictures, or the pictures themselves, [N, C, H, W].
        labels: int64 [N], of two classes at least.

    Returns:
        What reads the classes, int64 [M], of rows [M, D].
    """
    from sklearn import svm

    fitted = svm.SVC(C=10).fit(rows.flatten(1).numpy(), labels.numpy())
    return lambda seen: torch.from_numpy(fitted.predict(seen.flatten(1).numpy()))


def class_accuracy(read: Tensor, asked: Tensor, seed: int = 0) -> ClassAccuracy:
    """Compares what a judge read, int64 [N], with what was asked for, int64 [N].

    Raises:
        UserError: other lengths, or no samples.
    """
    read, asked = torch.as_tensor(read).long().cpu(), torch.as_tensor(asked).long().cpu()
    if read.shape != asked.shape or read.ndim != 1 or len(read) == 0:
        raise UserError(f"{list(read.shape)} readings cannot be compared with {list(asked.shape)} labels.")
    right = read == asked
    classes = int(max(read.max(), asked.max())) + 1
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((asked, read), torch.ones_like(asked), accumulate=True)
    per_class = {int(label): float(right[asked == label].double().mean()) for label in asked.unique()}
    return ClassAccuracy(float(right.double().mean()), mean_interval(right, seed=seed), per_class, confusion)
