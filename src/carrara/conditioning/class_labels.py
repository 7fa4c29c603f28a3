"""Class labels as a condition, with a null label for classifier-free guidance."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.conditioning.base import DataFacts, Input, TrainingInputs, check_dropout
from carrara.entries import construct
from carrara.errors import UserError, nearest
from carrara.process.noise import Noise


@dataclass(frozen=True)
class ClassLabels:
    """The classes of a model.

    Attributes:
        names: one for each class, in label order.
        dropout: the probability with which training replaces the label by the null label, `len(names)`; 0 means that
            there is none.
    """

    kind: ClassVar[str] = "labels"
    names: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (Input("labels", "class", "the class of every picture, by name or number", choices=self.names),)

    @property
    def slots(self) -> dict[str, int]:
        return {"label": len(self.names)}

    def encode(self, inputs: Mapping[str, Any], noise: Noise) -> Condition:
        return Condition(label=self.indices(inputs.get("labels")))

    def examples(self, batch: TrainingInputs, noise: Noise) -> Condition:
        return Condition(label=batch.labels)

    def null(self, condition: Condition) -> Condition:
        label = condition.label
        return replaced(condition, label=None if label is None else torch.full_like(label, len(self.names)))

    def config(self) -> dict[str, Any]:
        return {"names": list(self.names), "dropout": self.dropout}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return construct(cls, config, "labels")

    @classmethod
    def fit(cls, settings: Mapping[str, Any], data: DataFacts) -> Self:
        if data.class_names is None:
            raise UserError(
                f"the recipe conditions on labels, but {data.name} has none: sort the images into one folder per "
                "class, or set conditioning.kind=none.",
                key="conditioning.kind",
                code="mismatch",
            )
        return cls(data.class_names, settings["dropout"])

    def indices(self, labels: Sequence[int | str] | Tensor | None) -> Tensor:
        """Labels as int64 [N].

        Args:
            labels: one for each sample, as numbers 0..classes-1 or as class names.

        Raises:
            UserError: none, no list, or a label that the model does not know.
        """
        known = f"0..{len(self.names) - 1} or their names"
        if labels is None:
            raise UserError(
                f"this model is conditioned on a class: give labels, {known}.", key="labels", code="missing"
            )
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        if isinstance(labels, str) or (not isinstance(labels, Sequence) and not hasattr(labels, "__iter__")):
            raise UserError(
                f"labels is {labels!r}: give a list with one label for each picture, {known}.", key="labels"
            )
        return torch.tensor([self.index(value) for value in labels], dtype=torch.int64)

    def index(self, label: int | str) -> int:
        """The number of one class: a text is a class's name, or else its number; a number is its number.

        Raises:
            UserError: an unknown name, a number out of range, or anything else.
        """
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        if isinstance(label, str) and not (label.isascii() and label.removeprefix("-").isdigit()):
            raise UserError(
                f"the model knows no class '{label}': {nearest(label, self.names)}", key="labels", code="unknown"
            )
        try:
            number = int(label) if isinstance(label, str) else operator.index(label)
        except TypeError:
            raise UserError(f"the label {label!r} is neither a class's number nor its name.", key="labels") from None
        if not 0 <= number < len(self.names):
            raise UserError(
                f"label {number} is out of range: the model knows the classes 0..{len(self.names) - 1}.", key="labels"
            )
        return number
