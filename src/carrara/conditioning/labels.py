"""Class labels as a condition, with a null label for classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError, nearest


@dataclass(frozen=True)
class Labels:
    """The classes of a model.

    Attributes:
        names: one for each class, in label order.
        dropout: the probability with which training dropped the label; 0 means that the model knows no null label
            and cannot be guided classifier-free.
    """

    names: tuple[str, ...]
    dropout: float = 0.0

    def condition(self, labels: Sequence[int | str] | Tensor) -> Condition:
        """The condition of some labels, given as numbers 0..classes-1 or as class names.

        Raises:
            UserError: a number or name that the model does not know.
        """
        values = labels.tolist() if isinstance(labels, Tensor) else labels
        return Condition(label=torch.tensor([self.index(value) for value in values], dtype=torch.int64))

    def index(self, label: int | str) -> int:
        """The number of one class."""
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        if isinstance(label, str) and not label.lstrip("-").isdigit():
            raise UserError(f"the model knows no class '{label}': {nearest(label, self.names)}")
        number = int(label)
        if not 0 <= number < len(self.names):
            raise UserError(f"label {number} is out of range: the model knows the classes 0..{len(self.names) - 1}.")
        return number

    def null(self) -> Condition:
        """The condition of a dropped label, one row: the index behind the last class.

        Raises:
            UserError: the model was trained without label dropout.
        """
        if self.dropout == 0:
            raise UserError(
                "this model was trained without label dropout, so it knows no null label and classifier-free guidance "
                "is not defined: sample with guidance 1, or train with conditioning.dropout=0.1."
            )
        return Condition(label=torch.tensor([len(self.names)]))
