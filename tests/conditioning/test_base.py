"""Conditioners together: their registry, their inputs, their own draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
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

    declared: ClassVar[tuple[Input, ...]] = (Input("brightness", "number", "mean of the pixels", low=0.0, high=1.0),)

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.declared

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
    for fraction in (label.double().mean(), vector.double().mean()):
        assert abs(float(fraction) - 0.5) < 0.04  # 5 standard errors of a coin thrown 4,000 times
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


NUMBER = Input("strength", "number", "how strong", low=0.0, high=1.0)
SINGLE = Input("level", "number", "how much", per_sample=False, required=False, low=0.0)
CLASSES = Input("labels", "class", "the class", choices=("cat", "dog"))
TEXTS = Input("prompts", "text", "what is shown")
IMAGE = Input("map", "image", "the map", shape=(1, 4, 4))


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (NUMBER, [0, 1.0, np.float32(0.5)]),
        (NUMBER, torch.tensor([0.2, 0.8])),
        (SINGLE, 3),
        (SINGLE, torch.tensor(0.5)),
        (SINGLE, None),
        (CLASSES, ["cat", 1, "0"]),
        (CLASSES, torch.tensor([0, 1])),
        (TEXTS, ["a", ""]),
        (TEXTS, "a"),
        (IMAGE, torch.zeros(2, 1, 4, 4)),
    ],
)
def test_values_that_fit_an_input(declared: Input, value: Any) -> None:
    declared.check(value)


@pytest.mark.parametrize(
    ("declared", "value", "code"),
    [
        (NUMBER, None, "missing"),
        (NUMBER, 0.5, "invalid"),
        (NUMBER, [1.5], "invalid"),
        (NUMBER, [True], "invalid"),
        (NUMBER, ["0.5"], "invalid"),
        (NUMBER, [float("nan")], "invalid"),
        (NUMBER, torch.tensor([0.5, -1.0]), "invalid"),
        (SINGLE, -1, "invalid"),
        (SINGLE, "much", "invalid"),
        (CLASSES, ["cta"], "unknown"),
        (CLASSES, [2], "invalid"),
        (CLASSES, "cat", "invalid"),
        (TEXTS, ["a", 3], "invalid"),
        (TEXTS, 3, "invalid"),
        (IMAGE, torch.zeros(2, 1, 4, 5), "shape"),
        (IMAGE, torch.zeros(1, 4, 4), "shape"),
        (IMAGE, [[0.0]], "shape"),
        (IMAGE, torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "shape"),
        (IMAGE, torch.full((1, 1, 4, 4), 255.0), "invalid"),
    ],
)
def test_values_that_do_not_fit_an_input_are_refused(declared: Input, value: Any, code: Any) -> None:
    with refused(code, declared.name):
        declared.check(value)
