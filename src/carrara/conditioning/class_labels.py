"""Class labels as a condition, with a null label for classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.conditioning.base import DataFacts, Input, TrainingInputs, check_dropout, class_number
from carrara.entries import construct
from carrara.errors import UserError
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
    declared: ClassVar[tuple[Input, ...]] = (
        Input("labels", "class", "the class of every picture, by name or number", flags=("--label", "-l")),
    )
    names: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (replaced(self.declared[0], choices=self.names),)

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
        self.inputs[0].check(labels)
        assert labels is not None  # it is required
        rows = labels.tolist() if isinstance(labels, Tensor) else labels
        return torch.tensor([class_number(value, self.names) for value in rows], dtype=torch.int64)
