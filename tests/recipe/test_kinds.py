"""Sections of several kinds: an unknown kind, another kind's key, kinds of one's own; recipes of earlier versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import yaml

from carrara import conditioning, networks
from carrara.conditioning import ClassLabels
from carrara.networks import UNet, UNetParams
from carrara.recipe import CodecRecipe, DiffusionRecipe, load, validate
from carrara.recipe.noise_levels import EDM, LogNormal
from tests.errors import refused

RUNS = {
    "network": "digits",
    "schedule": "digits",
    "conditioning": "digits",
    "objective.times": "digits",
    "codec": "emoji-vq",
}


@pytest.mark.parametrize("section", RUNS)
def test_an_unknown_kind_is_refused_with_the_nearest(section: str) -> None:
    near = {
        "network": "dit",
        "schedule": "linear",
        "conditioning": "labels",
        "objective.times": "uniform",
        "codec": "vqgan",
    }
    with refused("unknown", f"{section}.kind"):
        load(RUNS[section], [f"{section}.kind={near[section]}x"])
    with pytest.raises(ValueError, match=f"did you mean '{near[section]}'"):
        load(RUNS[section], [f"{section}.kind={near[section]}x"])


def test_an_unknown_kind_of_run_is_refused_with_the_nearest() -> None:
    with refused("unknown", "kind"):
        load("digits", ["kind=difusion"])
    with pytest.raises(ValueError, match="did you mean 'diffusion'"):
        load("digits", ["kind=difusion"])


@pytest.mark.parametrize(
    ("name", "assignment", "key"),
    [
        ("digits", "schedule.tau=1", "schedule.tau"),
        ("digits", "objective.times.history=3", "objective.times.history"),
        ("digits", "network.patch_size=2", "network.patch_size"),
        ("digits", "conditioning.length=2", "conditioning.length"),
        ("digits", "loss.latent=1", "loss"),
        ("digits-classifier", "upsampling.factor=2", "upsampling"),
        ("emoji-kl", "codec.codes=16", "codec.codes"),
        ("emoji-kl", "network.channels=16", "network"),
    ],
)
def test_a_key_of_another_kind_is_refused_and_the_kind_is_named(name: str, assignment: str, key: str) -> None:
    with refused("unknown", key):
        load(name, [assignment])
    with pytest.raises(ValueError, match="it is for kind"):
        load(name, [assignment])


@pytest.mark.parametrize("value", ["3", "[1]", "text"])
def test_a_section_that_is_no_mapping_is_refused(value: str) -> None:
    for section in ("network", "schedule", "conditioning", "objective"):
        with refused("invalid", section):
            load("digits", [f"{section}={value}"])


def test_a_section_is_typed_to_the_leaf() -> None:
    recipe = load("digits", ["schedule={kind: edm, sigma_max: 50}", "objective.times={kind: log_normal, mean: -1}"])
    assert isinstance(recipe, DiffusionRecipe)
    assert recipe.schedule == EDM(kind="edm", sigma_max=50.0)
    assert recipe.times == LogNormal(kind="log_normal", mean=-1.0)
    assert recipe.network.given()["channel_mult"] == (1.0, 2.0)
    codec = load("emoji-vq")
    assert isinstance(codec, CodecRecipe)
    assert codec.codec.given()["codes"] == 512


@pytest.mark.parametrize("name", ["digits", "digits-classifier", "emoji-kl", "emoji-vq", "emoji-latent"])
def test_what_a_run_saves_is_read_back(name: str) -> None:
    recipe = load(name)
    again = validate(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


EVERYTHING: dict[str, Any] = {
    "conditioning": {"kind": "none", "dropout": 0.1},
    "codec": {},
    "network": {},
    "loss": {},
    "discriminator": {},
    "schedule": {"kind": "cosine", "zero_terminal_snr": False},
    "objective": {"predicts": "eps", "loss": "simple", "vlb_weight": 0.001, "times": {"kind": "uniform"}}
    | {"weight": {"kind": "uniform", "gamma": 5.0, "floor": 0.0}},
    "sampling": {"solver": "dpm++2m", "steps": 20, "spacing": "trailing", "guidance": 1.0, "count": 16, "seed": 0},
}
"""The sections that the first edition saved for every kind of run, at their defaults."""


@pytest.mark.parametrize("name", ["digits", "digits-classifier", "emoji-kl"])
def test_recipes_of_the_first_edition_are_read(name: str) -> None:
    recipe = load(name)
    kept = {key: value for key, value in EVERYTHING.items() if key not in recipe.model_fields_set}
    assert validate({**recipe.model_dump(exclude_unset=True), **kept}) == recipe
    schedule = {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "zero_terminal_snr": False}
    times = {"times": {"kind": "logit_normal", "mean": 0.0, "spread": 2.0}}
    old = validate({**load("digits").model_dump(exclude_unset=True), "schedule": schedule, "objective": times})
    assert isinstance(old, DiffusionRecipe)
    assert old.times.model_dump() == {"kind": "logit_normal", "mean": 0.0, "std": 2.0}


def test_a_section_of_another_kind_that_is_not_at_its_default_is_refused() -> None:
    with refused("unknown", "conditioning"):
        validate({**load("emoji-kl").model_dump(exclude_unset=True), "conditioning": {"kind": "labels"}})


@dataclass(frozen=True)
class OtherLabels(ClassLabels):
    """Another class for the same word."""


@dataclass(frozen=True)
class OtherParams(UNetParams):
    """Params that are not registered."""


class Other(UNet):
    """A network that is not registered."""


def test_a_kind_that_is_registered_twice_is_refused() -> None:
    with refused("conflict", "labels"):
        conditioning.register(OtherLabels)
    assert conditioning.KINDS["labels"] is ClassLabels
    assert conditioning.register(ClassLabels) is ClassLabels
    for kind, network, params in (
        ("unet", Other, OtherParams),
        ("other", UNet, OtherParams),
        ("other", Other, UNetParams),
    ):
        with refused("conflict", "network.kind"):
            networks.register(kind, network, params)
    assert "other" not in networks.kinds()


class Brush(ClassLabels):
    """A conditioner with settings that are not its own fields."""

    kind: ClassVar[str] = "brush"


@dataclass(frozen=True)
class BrushSettings:
    """
    Attributes:
        width: of the brush, in pixels.
    """

    width: int = 3


def test_the_settings_of_a_conditioner_are_typed() -> None:
    conditioning.register(Brush, BrushSettings)
    try:
        recipe = load("digits", ["conditioning={kind: brush, width: 5}"])
        assert isinstance(recipe, DiffusionRecipe)
        assert recipe.conditioning.model_dump() == {"kind": "brush", "dropout": 0.1, "width": 5}
        with refused("invalid", "conditioning.width"):
            load("digits", ["conditioning={kind: brush, width: wide}"])
        with refused("unknown", "conditioning.names"):
            load("digits", ["conditioning={kind: brush, names: [a]}"])
    finally:
        del conditioning.KINDS["brush"]


@dataclass(frozen=True)
class DtypeSettings:
    """A setting that no recipe can contain."""

    precision: torch.dtype = torch.float32


def test_settings_that_no_recipe_can_contain_are_refused() -> None:
    conditioning.register(Brush, DtypeSettings)
    try:
        with refused("unsupported", "conditioning"):
            load("digits")
    finally:
        del conditioning.KINDS["brush"]


def test_a_section_of_another_union_is_refused() -> None:
    data = load("digits").model_dump(exclude={"schedule"})
    with refused("invalid", "schedule"):
        validate({**data, "schedule": LogNormal(kind="log_normal")})
