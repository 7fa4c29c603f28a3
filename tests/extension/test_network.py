"""A network from outside the package goes through recipe, training, saving, loading, sampling and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara import networks
from carrara.condition import Condition
from carrara.model import DiffusionModel
from carrara.networks import network as registry
from carrara.recipe import Recipe, validate
from carrara.training import Trainer
from tests.errors import refused
from tests.processes import together


@dataclass(frozen=True)
class ToyParams:
    """The fields that a recipe's data decide, and one of its own."""

    in_channels: int
    num_classes: int | None = None
    null_label: bool = False
    width: int = 8


class Toy(networks.Network):
    """Two convolutions, with the time and the class as biases of the map between them."""

    def __init__(self, params: ToyParams) -> None:
        super().__init__()
        self.params = params
        self.first = nn.Conv2d(params.in_channels, params.width, 3, padding=1)
        self.time = nn.Linear(1, params.width)
        self.label = nn.Embedding((params.num_classes or 0) + params.null_label, params.width)
        self.last = nn.Conv2d(params.width, params.in_channels, 3, padding=1)

    @property
    def takes(self) -> dict[str, int]:
        return {"label": self.label.num_embeddings}

    @property
    def shard_units(self) -> list[nn.Module]:
        return [self.first, self.last]

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition | None = None) -> Tensor:
        bias = self.time(network_time.reshape(-1, 1) / 1000).expand(len(x), -1)
        if condition is not None and condition.label is not None:
            bias = bias + self.label(condition.label)
        h = self.first(x) + bias[:, :, None, None]
        return x + self.last(F.silu(h))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BlindParams:
    """Of a network that has no place for classes."""

    in_channels: int


class Blind(networks.Network):
    def __init__(self, params: BlindParams) -> None:
        super().__init__()
        self.params = params


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    networks.register("toy", Toy, ToyParams)
    networks.register("blind", Blind, BlindParams)
    yield
    for kind in ("toy", "blind"):
        del registry._KINDS[kind]


def recipe(network: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "name": "outside",
        "data": {"path": "digits", "resolution": 8, "channels": 1},
        "network": network,
        "conditioning": {"kind": "labels"},
        "training": {"steps": 4, "batch_size": 16, "warmup": 0, "tracker": "none", "ema": 0.5},
        "sampling": {"steps": 2, "count": 2},
    }
    return validate({**base, **sections})


DIT = {"kind": "dit", "patch_size": 2, "width": 16, "depth": 2, "heads": 2}


@pytest.mark.parametrize("network", [{"kind": "toy", "width": 6}, DIT], ids=["toy", "dit"])
def test_it_is_trained_saved_loaded_sampled_and_fine_tuned(network: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer(recipe(network), tmp_path / "run")
    before = {name: weight.clone() for name, weight in trainer.network.state_dict().items()}
    assert len(list(trainer.steps())) == 4
    model = DiffusionModel.load(tmp_path / "run")
    assert networks.config(model.network).items() >= network.items()
    assert networks.config(model.network)["num_classes"] == 10
    assert any(not torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())
    one = model.sample(labels=[3, 7], steps=3, guidance=2.0, seed=0)
    assert one.images.shape == (2, 1, 8, 8)
    model.save(tmp_path / "copy")
    again = DiffusionModel.load(tmp_path / "copy")
    assert torch.equal(one.images, again.sample(labels=[3, 7], steps=3, guidance=2.0, seed=0).images)
    tuned = recipe({})
    tuned = validate({**tuned.model_dump(exclude_defaults=True), "start": str(tmp_path / "copy"), "network": {}})
    further = Trainer(tuned, tmp_path / "further")
    assert type(further.network) is type(model.network)
    for name, weight in further.network.state_dict().items():
        assert torch.equal(weight, model.network.state_dict()[name]), name
    further.run.close()


def test_what_the_recipe_cannot_give_it_is_refused(tmp_path: Path) -> None:
    for network, code, key in (
        ({"kind": "toys"}, "unknown", "network.kind"),
        ({"kind": "blind"}, "unsupported", "network.kind"),
        ({"kind": "encoder_classifier"}, "unknown", "network.kind"),
    ):
        with refused(code, key):  # type: ignore[arg-type]
            Trainer(recipe(network), tmp_path / "run")


def test_a_config_of_a_kind_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    model = Trainer(recipe({"kind": "toy"}), tmp_path / "run")
    list(model.steps())
    entry = registry._KINDS.pop("toy")
    try:
        with refused("unknown", "network.kind"):
            DiffusionModel.load(tmp_path / "run")
    finally:
        registry._KINDS["toy"] = entry


def trained(folder: Path, parallel: str) -> list[float]:
    sections = {"training": {"steps": 3, "batch_size": 16, "warmup": 0, "tracker": "none", "parallel": parallel}}
    return [progress.loss for progress in Trainer(recipe(DIT, **sections), folder).steps() if progress.notice is None]


def test_a_transformer_is_sharded_by_its_blocks_and_learns_alike(tmp_path: Path) -> None:
    """Sums over the batch in another order: float32 rounding through three steps."""
    one = together(1, trained, tmp_path / "one", "ddp")[0]
    for parallel in ("ddp", "fsdp"):
        assert together(2, trained, tmp_path / parallel, parallel)[0] == pytest.approx(one, rel=1e-4)
        assert DiffusionModel.load(tmp_path / parallel).sample(labels=[0], steps=2).images.isfinite().all()
