"""Networks and conditioners in a recipe: those of the package, and those that were registered from outside."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar, Literal

from pydantic import Field

from carrara import conditioning, networks
from carrara.networks.contrastive import TowersParams
from carrara.recipe.section import Section, section_from

DECIDED = (
    "image_size",
    "in_channels",
    "num_classes",
    "null_label",
    "vector_channels",
    "concat_channels",
    "upsample_concat",
    "vocabulary",
)
"""Params of a network that follow from the data and the conditioning."""
CLASSIFIER = "encoder_classifier"
TOWERS = ("image_features", "text_features", "image_size", "image_channels", "vocabulary")
"""Of a scorer's towers, what follows from the data and the encoders."""


class Network(Section):
    """The network that is trained: its params, but for those that data and conditioning decide."""

    sparse: ClassVar[bool] = True
    kind: str


class Conditioning(Section):
    """What the model is conditioned on.

    Attributes:
        dropout: fraction of samples whose condition is dropped in training, so that the model can be guided
            classifier-free; 0 trains no null condition.
    """

    kind: str
    dropout: float = Field(0.1, ge=0, lt=1)


class NoConditioning(Conditioning):
    """Nothing."""

    kind: Literal["none"] = "none"


class LabelConditioning(Conditioning):
    """The class of every image."""

    kind: Literal["labels"]


class TowersSection(section_from(None, TowersParams, decided=TOWERS)):  # type: ignore[misc]
    """The two towers of a scorer."""

    sparse: ClassVar[bool] = True
    described_by: ClassVar[tuple[type, ...]] = (TowersParams,)


def default_network(kind: str) -> Network:
    """A network of a kind with every param at its default."""
    return _network(kind, networks.params_class(kind)).model_validate({})


def backbones() -> Mapping[str, type[Section]]:
    """The networks that can be trained as diffusion models."""
    kinds = sorted(networks.kinds(), key=lambda kind: kind != "unet")
    return {kind: _network(kind, networks.params_class(kind)) for kind in kinds if kind != CLASSIFIER}


def classifiers() -> Mapping[str, type[Section]]:
    """The networks that can be trained as classifiers."""
    return {CLASSIFIER: _network(CLASSIFIER, networks.params_class(CLASSIFIER))}


def conditions() -> Mapping[str, type[Section]]:
    """What a diffusion model can be conditioned on; the section `upsampling` adds low-resolution images."""
    outside = {kind: cls for kind, cls in conditioning.KINDS.items() if kind not in ("labels", "low_res")}
    registered = {kind: _conditioner(kind, conditioning.settings_of(cls)) for kind, cls in outside.items()}
    return {"none": NoConditioning, "labels": LabelConditioning, **registered}


@cache
def _network(kind: str, params: type) -> type[Network]:
    return section_from(kind, params, base=Network, decided=DECIDED, optional_kind=kind in ("unet", CLASSIFIER))


@cache
def _conditioner(kind: str, settings: type | None) -> type[Section]:
    sources = [] if settings is None else [settings]
    return section_from(kind, *sources, base=Conditioning, without=("dropout",))
