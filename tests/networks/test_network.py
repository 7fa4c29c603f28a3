"""The registry of networks: kinds, configs and their refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor, nn

from carrara import networks
from carrara.condition import Condition
from carrara.networks import EncoderClassifier, EncoderClassifierParams, Network, UNet, UNetParams
from carrara.networks import network as registry
from carrara.networks.layers import ResidualBlock, SelfAttention
from tests.errors import refused

SMALL = UNetParams(
    image_size=(8, 8), channels=8, channel_mult=(1, 2), blocks_per_level=1, attention=(2,), num_classes=3
)


@dataclass(frozen=True)
class ToyParams:
    width: int = 2
    sides: tuple[int, ...] = (1, 2)


class Toy(Network):
    def __init__(self, params: ToyParams) -> None:
        super().__init__()
        self.params = params
        self.map = nn.Linear(params.width, params.width)

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition | None = None) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def toy() -> Iterator[None]:
    networks.register("toy-of-this-test", Toy, ToyParams)
    yield
    del registry._KINDS["toy-of-this-test"]


class TestConfig:
    @pytest.mark.parametrize(
        "network", [UNet(SMALL), EncoderClassifier(EncoderClassifierParams(image_size=(8, 8), channels=8))]
    )
    def test_is_json_and_builds_the_same_shape(self, network: Network) -> None:
        config = json.loads(json.dumps(networks.config(network)))
        again = networks.build(config)
        assert type(again) is type(network)
        assert again.params == network.params
        assert networks.config(again) == networks.config(network)

    def test_of_a_users_own_network(self, toy: None) -> None:
        network = networks.build({"kind": "toy-of-this-test", "width": 3, "sides": [4, 5]})
        assert isinstance(network, Toy)
        assert network.params == ToyParams(3, (4, 5))
        assert networks.config(network) == {"kind": "toy-of-this-test", "width": 3, "sides": (4, 5)}
        assert (dict(network.takes), network.learned_variance, list(network.shard_units)) == ({}, False, [])

    def test_of_a_saved_unet_of_earlier_versions(self) -> None:
        """Those configs hold every field and "unet"; fields that came later have their defaults."""
        config = {"kind": "unet", **asdict(SMALL)}
        del config["label_tokens"], config["context_only"]
        assert networks.build(config).params == SMALL

    def test_an_unregistered_module_has_none(self) -> None:
        for module in (nn.Linear(1, 1), Toy(ToyParams())):
            with refused("unsupported", key="network.kind"):
                networks.config(module)


class TestRefusals:
    @pytest.mark.parametrize("kind", ["unit", "", "UNet", "encoder-classifier"])
    def test_an_unknown_kind(self, kind: str) -> None:
        with refused("unknown", key="network.kind"):
            networks.build({"kind": kind})
        with refused("unknown", key="network.kind"):
            networks.params_class(kind)

    def test_no_kind(self) -> None:
        with refused("unknown", key="network.kind"):
            networks.build({})

    def test_an_unknown_key(self) -> None:
        with refused("unknown", key="network.chanels"):
            networks.build({"kind": "unet", "chanels": 8})

    def test_params_of_no_network(self) -> None:
        with refused("unknown", key="network.kind"):
            networks.create(ToyParams())

    @pytest.mark.parametrize(
        ("kind", "network", "params"),
        [
            ("unet", Toy, ToyParams),
            ("toy-of-this-test", Toy, ToyParams),
            ("other", Toy, UNetParams),
            ("other", UNet, ToyParams),
        ],
    )
    def test_a_second_registration(self, toy: None, kind: str, network: type[Network], params: type) -> None:
        with refused("conflict", key="network.kind"):
            networks.register(kind, network, params)
        assert networks.params_class("unet") is UNetParams

    def test_params_that_are_no_dataclass(self) -> None:
        with refused("invalid", key="network.kind"):
            networks.register("other", Toy, dict)


def test_shard_units_are_the_blocks() -> None:
    units = list(UNet(SMALL).shard_units)
    assert {type(unit) for unit in units} == {ResidualBlock, SelfAttention}
    names = [name for name, module in UNet(SMALL).named_modules() if isinstance(module, ResidualBlock | SelfAttention)]
    assert len(units) == len(names)


def test_takes_and_learned_variance_follow_the_params() -> None:
    plain = UNet(SMALL)
    assert {slot: width for slot, width in plain.takes.items() if width} == {"label": 3}
    assert not plain.learned_variance
    assert networks.build({**networks.config(plain), "learned_variance": True}).learned_variance
    assert torch.equal(
        UNet(SMALL)(torch.ones(1, 3, 8, 8), torch.ones(1), Condition(label=torch.tensor([0]))), torch.zeros(1, 3, 8, 8)
    )
