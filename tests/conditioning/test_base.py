"""Conditioners together: their registry, their inputs, their own draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
import torch

from carrara.condition import Condition
from carrara.conditioning import (
    ClassLabels,
    Conditioner,
    DataFacts,
    Input,
    NullForm,
    TrainingInputs,
    build,
    count_samples,
    drop,
    encode,
    kind_of,
    register,
    stream,
)
from carrara.process import Noise
from tests.errors import refused


@dataclass(frozen=True)
class Brightness:
    """A number for every sample, in `Condition.vector`; its null form is -1."""

    kind: ClassVar[str] = "test-brightness"
    dropout: float = 0.5

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (Input("brightness", "number", "mean of the pixels", low=0.0, high=1.0),)

    @property
    def slots(self) -> dict[str, int]:
        return {"vector": 1}

    def encode(self, inputs: Mapping[str, Any], noise: Noise) -> Condition:
        return Condition(vector=torch.tensor(inputs["brightness"])[:, None])

    def examples(self, batch: TrainingInputs, noise: Noise) -> Condition:
        assert batch.images is not None
        return Condition(vector=batch.images.flatten(1).mean(1, keepdim=True))

    def null(self, condition: Condition) -> Condition:
        assert condition.vector is not None
        return Condition(label=condition.label, vector=torch.full_like(condition.vector, -1))

    def config(self) -> dict[str, Any]:
        return {"dropout": self.dropout}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["dropout"])

    @classmethod
    def fit(cls, settings: Mapping[str, Any], data: DataFacts) -> Self:
        return cls(settings["dropout"])


def test_a_registered_kind_is_built_from_its_config() -> None:
    register(Brightness)
    register(Brightness)  # the same class again is no conflict
    made = Brightness(0.25)
    assert build({"kind": made.kind, **made.config()}) == made
    with refused("conflict", "test-brightness"):
        register(type("Other", (Brightness,), {}))
    with refused("unknown", "lables"):
        kind_of("lables")


def test_each_conditioner_is_dropped_by_its_own_draw() -> None:
    conditioners: tuple[Conditioner, ...] = (ClassLabels(("a", "b"), 0.5), Brightness(0.5))
    size = 4000
    condition = Condition(label=torch.zeros(size, dtype=torch.int64), vector=torch.zeros(size, 1))
    dropped = drop(conditioners, condition, Noise(1), size)
    assert dropped.label is not None
    assert dropped.vector is not None
    label, vector = dropped.label == 2, dropped.vector[:, 0] == -1
    for share in (label.double().mean(), vector.double().mean()):
        assert abs(float(share) - 0.5) < 0.04  # 5 standard errors of a coin thrown 4,000 times
    assert abs(float((label & vector).double().mean()) - 0.25) < 0.035


def test_streams_of_kinds_are_apart() -> None:
    noise = Noise(1).at(2**40)
    draws = {stream(noise, kind).draw for kind in ("labels", "text", "low_res", "frames")}
    assert len(draws) == 4
    assert noise.draw not in draws


def test_inputs_of_no_conditioner_are_refused() -> None:
    with refused("unsupported", "prompts"):
        encode((ClassLabels(("a",)),), {"labels": [0], "prompts": ["x"]}, Noise())


@pytest.mark.parametrize(
    ("given", "count", "code", "key"),
    [
        ({"labels": [1, 2]}, 3, "shape", "labels"),
        ({"labels": [1, 2], "start": torch.zeros(3, 1)}, None, "shape", "start"),
        ({"labels": []}, None, "invalid", "count"),
        ({}, 0, "invalid", "count"),
        ({}, 2.7, "invalid", "count"),
    ],
)
def test_counts_that_disagree_are_refused(given: dict[str, Any], count: Any, code: Any, key: str) -> None:
    with refused(code, key):
        count_samples((ClassLabels(("a", "b", "c")),), given, count)


def test_guidance_moves_away_from_what_was_dropped() -> None:
    both = NullForm((ClassLabels(("a", "b"), 0.0), Brightness(0.5)))
    null = both.null(Condition(label=torch.tensor([1]), vector=torch.zeros(1, 1)))
    assert null.label is not None
    assert null.vector is not None
    assert (null.label.item(), null.vector.item()) == (1, -1)
    with refused("unsupported", "guidance"):
        NullForm((ClassLabels(("a",), 0.0),))
