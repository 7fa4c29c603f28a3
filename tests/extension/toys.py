"""A network and a conditioner as a user writes them, outside of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from carrara import networks
from carrara.condition import Condition
from carrara.conditioning import DataFacts, Input, TrainingInputs, register
from carrara.networks import Network
from carrara.process import Noise


@dataclass(frozen=True, kw_only=True)
class PixelwiseParams:
    """What the network is made of.

    Attributes:
        width: of its one hidden layer, in channels.
    """

    image_size: tuple[int, ...]
    in_channels: int = 1
    vector_channels: int = 0
    width: int = 16


class Pixelwise(Network):
    """A network that sees one pixel at a time, with the time and a vector."""

    def __init__(self, params: PixelwiseParams) -> None:
        super().__init__()
        self.params = params
        self.first = nn.Linear(params.in_channels + 1 + params.vector_channels, params.width)
        self.last = nn.Linear(params.width, params.in_channels)

    @property
    def takes(self) -> Mapping[str, int]:
        return {"vector": self.params.vector_channels}

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition | None = None) -> Tensor:
        known = [(network_time.to(x) / 1000).expand(len(x))[:, None]]
        if condition is not None and condition.vector is not None:
            known.append(condition.vector.to(x))
        same = torch.cat(known, dim=1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        h = self.first(torch.cat([x, same], dim=1).movedim(1, -1)).relu()
        return self.last(h).movedim(-1, 1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Brightness:
    """The mean of an image's pixels; its null form is -2, which no image has.

    Attributes:
        highest: the largest mean that is sampled, in -1..1.
    """

    kind: ClassVar[str] = "brightness"
    declared: ClassVar[tuple[Input, ...]] = (Input("brightness", "number", "the mean of the pixels", low=-1.0),)
    dropout: float
    highest: float = 1.0

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (replace(self.declared[0], high=self.highest),)

    @property
    def slots(self) -> Mapping[str, int]:
        return {"vector": 1}

    def encode(self, inputs: Mapping[str, Any], noise: Noise) -> Condition:
        return Condition(vector=torch.as_tensor(inputs["brightness"], dtype=torch.float32).reshape(-1, 1))

    def examples(self, batch: TrainingInputs, noise: Noise) -> Condition:
        assert batch.images is not None
        return Condition(vector=batch.images.flatten(1).mean(1, keepdim=True))

    def null(self, condition: Condition) -> Condition:
        assert condition.vector is not None
        return replace(condition, vector=torch.full_like(condition.vector, -2))

    def config(self) -> dict[str, Any]:
        return {"dropout": self.dropout, "highest": self.highest}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["dropout"], config["highest"])

    @classmethod
    def fit(cls, settings: Mapping[str, Any], data: DataFacts) -> Self:
        return cls(**settings)


networks.register("pixelwise", Pixelwise, PixelwiseParams)
register(Brightness)
