"""Codecs in a recipe: the kinds that can be trained, the published shapes, and what they are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from carrara.codecs import DiscreteParams, QuantiserParams
from carrara.errors import UserError
from carrara.networks.autoencoder import AutoencoderParams
from carrara.networks.discriminator import DiscriminatorParams
from carrara.objectives.codec import LOSSES, CodecLoss
from carrara.presets import published_codecs
from carrara.recipe.section import Section, describe, section_from

PARTS: dict[str, type] = {
    "vq": QuantiserParams,
    "vqgan": QuantiserParams,
    "dvae": DiscreteParams,
    "gumbel": DiscreteParams,
}
"""What a codec has in addition to its autoencoder."""


class LatentCodec(Section):
    """The codec that a diffusion model works in.

    Attributes:
        path: its run or folder; null works on pixels, or with `start` in the codec of that model.
        cache: the folder where `carrara data encode` has put the latents; null encodes the images.
    """

    path: str | None = None
    cache: str | None = None


class Codec(Section):
    """A codec to train.

    Attributes:
        scale: "one" number for all latents, or one for each "channel".
    """

    sparse: ClassVar[bool] = True
    kind: str
    scale: Literal["one", "channel"] = "one"

    @property
    def name(self) -> str:
        """The published shape or the kind."""
        return str(getattr(self, "preset", None) or self.kind)

    def config(self, in_channels: int, images: int) -> dict[str, Any]:
        """The plain data from which `codecs.build` makes it.

        Args:
            in_channels: of the data.
            images: how many the run will see: a discrete codec hardens its choice over the first four fifths of them,
                unless `anneal` is set.

        Raises:
            UserError: values that do not go together.
        """
        given = {key: value for key, value in self.given().items() if key not in ("scale", "preset")}
        if getattr(self, "preset", None):
            given = _shape(self.name) | given
        if self.kind == "hierarchical":
            return {"kind": "hierarchical", "levels": _levels(given, in_channels)}
        names = {field.name for field in fields(AutoencoderParams)}
        network = {key: value for key, value in given.items() if key in names}
        own = {key: value for key, value in given.items() if key not in names}
        config: dict[str, Any] = {"params": asdict(AutoencoderParams(in_channels=in_channels, **network))}
        if PARTS.get(self.kind) is QuantiserParams:
            config |= {"kind": "vq", "quantiser": asdict(QuantiserParams(**own))}
        elif self.kind in PARTS:
            if "temperature" in own and own.get("anneal") == 0:
                raise UserError(
                    "codec.temperature is where annealing begins, but codec.anneal is 0: leave one of them out.",
                    key="codec.temperature",
                    code="conflict",
                )
            config |= {"kind": "discrete", "choice": asdict(DiscreteParams(**{"anneal": 4 * images // 5, **own}))}
        else:
            config["kind"] = "kl" if self.kind == "vae" else self.kind
        if self.kind in ("vae", "dvae"):  # their KL weighs 1 against a likelihood, whose width is learned
            config["learned_scale"] = True
        return config


class PublishedCodec(Codec):
    """A codec to train, perhaps of a published shape.

    Attributes:
        preset: a published shape, of which the other keys change single fields.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema, kind: _kind_or_preset(schema, kind))


class TrainedCodec(Section):
    """What of a trained codec, the run's `start`, is fine-tuned.

    Attributes:
        learn: "all", or the "decoder" alone, so that every latent stays what it is.
    """

    learn: Literal["all", "decoder"] = "all"


def _kind_or_preset(schema: dict[str, Any], kind: type[Section]) -> None:
    describe(schema, kind)
    schema["anyOf"] = [{"required": ["kind"]}, {"required": ["preset"]}]


PRESETS: dict[str, list[str]] = {"kl": [], "vqgan": [], "gumbel": []}
"""The published shapes of each kind: all were trained against a discriminator."""
for _name in published_codecs.PRESETS:
    _arguments = published_codecs.PUBLISHED[_name]
    PRESETS["gumbel" if "kl_weight" in _arguments else "vqgan" if "n_embed" in _arguments else "kl"].append(_name)


class Level(section_from(None, AutoencoderParams, decided=("in_channels",))):  # type: ignore[misc]
    """One level of a hierarchical VAE."""

    sparse: ClassVar[bool] = True


@cache
def codecs() -> Mapping[str, type[Section]]:
    """The kinds of codec that can be trained, and "trained" for one that is fine-tuned."""
    members: dict[str, type[Section]] = {"trained": TrainedCodec}
    for kind in LOSSES:
        base: type[Section] = PublishedCodec if kind in PRESETS else Codec
        sources = (AutoencoderParams, PARTS[kind]) if kind in PARTS else (AutoencoderParams,)
        more: dict[str, Any] = {}
        if kind in PRESETS:
            more = {"preset": (Literal[*PRESETS[kind]] | None, None)}
        elif kind == "hierarchical":
            about = "the shape of each level, from the image on; other keys hold for all of them."
            more = {"levels": (tuple[Level, ...], Field(description=about, min_length=1))}
        members[kind] = section_from(
            kind,
            *sources,
            optional_kind=kind in PRESETS,
            decided=("in_channels",),
            without=("legacy",),  # the loss of VQGAN's first weights, which are loaded with it
            base=base,
            **more,
        )
    return members


def codec_kind(data: Mapping[str, Any]) -> str | None:
    """The kind of a codec to train: its preset's where it has one alone."""
    kind, preset = data.get("kind"), data.get("preset")
    if kind is None and preset is not None:
        return next((rung for rung, names in PRESETS.items() if preset in names), "kl")
    return kind


class Loss(section_from(None, CodecLoss)):  # type: ignore[misc]
    """What a codec is trained on; default: as its kind is usually trained (docs/codecs.md).

    Attributes:
        perceptual_from: of the perceptual term, a classifier's folder or a file of VGG or LPIPS weights.
        perceptual_checksum: the file's SHA-256, where it is not a published one.
    """

    sparse: ClassVar[bool] = True
    described_by: ClassVar[tuple[type, ...]] = (CodecLoss,)
    perceptual_from: str | None = None
    perceptual_checksum: str | None = None

    def of(self, kind: str) -> CodecLoss:
        """The usual loss of a kind of codec, with the changes.

        Raises:
            UserError: keys of a discriminator that takes no part.
        """
        given = self.given()
        changes = {key: value for key, value in given.items() if not key.startswith("perceptual_")}
        usual = asdict(LOSSES[kind])
        if "perceptual" not in changes and "perceptual_from" not in given:
            usual["perceptual"] = 0.0  # without a network to look through there is none
        loss = CodecLoss(**{**usual, **changes})
        idle = [key for key in ("gan", "adaptive", "start", "ramp") if key in changes and not loss.adversarial]
        if idle:
            raise UserError(
                f"loss.{idle[0]} is given, but loss.adversarial is 0: set it above 0, or leave this out.",
                key=f"loss.{idle[0]}",
                code="conflict",
            )
        return loss


class DiscriminatorSection(section_from(None, DiscriminatorParams, decided=("in_channels",))):  # type: ignore[misc]
    """The patch discriminator of a codec."""

    sparse: ClassVar[bool] = True
    described_by: ClassVar[tuple[type, ...]] = (DiscriminatorParams,)


def _shape(preset: str) -> dict[str, Any]:
    """The keys that a published shape fills in."""
    published = published_codecs.preset(preset)
    shape = {**published["params"], **published.get("quantiser", {}), **published.get("choice", {})}
    # The data decide their channels and the run's length the annealing, and β's first place is for old weights only.
    return {key: value for key, value in shape.items() if key not in ("in_channels", "temperature", "anneal", "legacy")}


def _levels(given: dict[str, Any], in_channels: int) -> list[dict[str, Any]]:
    """The params of each level of a hierarchical VAE."""
    made = []
    for level in given.pop("levels"):
        params = AutoencoderParams(**{**given, **level.given(), "in_channels": in_channels})
        in_channels = params.latent_channels
        made.append(asdict(params))
    return made
