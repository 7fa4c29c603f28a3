"""A whole run as one validated piece of data, of one of four kinds, and what in it must go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, TypeAdapter, model_validator

from carrara import networks
from carrara.conditioning import shrunk_size
from carrara.errors import UserError
from carrara.networks.contrastive import TowersParams
from carrara.process import schedules
from carrara.recipe import codecs, conditions
from carrara.recipe.conditions import CLASSIFIER, Conditioning, Network, NoConditioning
from carrara.recipe.noise_levels import ClassifierObjective, Cosine, Objective, Schedule, Times
from carrara.recipe.saved import current
from carrara.recipe.section import OneOf, Section
from carrara.recipe.sections import Data, Encoders, Previews, Sampling, Training, Upsampling

Backbone = Annotated[Network, OneOf(conditions.backbones, "unet")]
ClassifierNetwork = Annotated[Network, OneOf(conditions.classifiers, CLASSIFIER)]


CONTEXT_CHANNELS = 256
"""Width of a jointly trained text encoder, by default."""
_ORDER = (
    *("name", "kind", "seed", "start", "data", "encoders", "conditioning", "codec", "upsampling", "network", "loss"),
    *("discriminator", "schedule", "objective", "training", "sampling"),
)
"""Of the sections in a file."""


class Recipe(Section):
    """A whole run.

    Attributes:
        name: what the run folder is called by default.
        seed: of the weights, the order, and every draw; in 0..2⁶⁴-1.
        start: the run or folder of a model, classifier or codec whose weights the run starts from (fine-tuning). What
            it is made for follows from it: network, schedule, prediction, codec and up-sampling of a model, all but
            `learn` of a codec. `network` may change `dropout` and `checkpointing`, where the network has them.
        data: which images, and how they are brought to size.
        training: how the objective is minimised.
    """

    from_start: ClassVar[str] = "model"

    name: str = Field(pattern=r"^[\w.-]+$")
    kind: str
    seed: int = Field(0, ge=0, lt=2**64)
    start: str | None = None
    data: Data
    training: Training

    def data_path(self) -> str:
        """Where the images are.

        Raises:
            UserError: the recipe does not name them.
        """
        if self.data.path is None:
            about = f" ({self.data.about})" if self.data.about else ""
            raise UserError(
                f"the recipe {self.name} trains on images of yours{about}: give them with --data PATH.",
                key="data.path",
                code="missing",
            )
        return self.data.path

    def to_yaml(self) -> str:
        """The recipe as YAML that `load` reads back to an equal one."""
        data = self.model_dump(mode="json", exclude_none=True)
        ordered = {key: data[key] for key in sorted(data, key=_ORDER.index)}
        return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)

    def _refuse_decided(self, keys: list[str]) -> None:
        """Raises UserError for keys that follow from what the run starts from."""
        if keys:
            raise UserError(
                f"{keys[0]} follows from the {self.from_start} that the run starts from, {self.start}: leave it out.",
                key=keys[0],
                code="conflict",
            )


class NetworkRecipe(Recipe):
    """A run that trains one network at the noise levels of a schedule.

    Attributes:
        network: what is trained.
        schedule: the noise levels.
        objective: what is minimised.
    """

    network: Network
    schedule: Schedule = Cosine()
    objective: Objective | ClassifierObjective

    @property
    def times(self) -> Times:
        """Which noise levels are visited."""
        return self.objective.times

    @model_validator(mode="after")
    def _fits(self) -> NetworkRecipe:
        schedules.build(self.schedule.spec())
        if self.start is None:
            self._check_network()
            return self
        keys = [f"network.{key}" for key in self.network.model_fields_set - {"dropout", "checkpointing"}]
        keys += ["schedule"] if self.schedule != Cosine() else []
        self._refuse_decided(sorted(keys))
        return self

    def _check_network(self) -> None:
        """Raises UserError unless the network can be made, as far as is known without data."""
        raise NotImplementedError

    def _params(self, decided: Mapping[str, Any], usually: Mapping[str, Any] | None = None) -> Any:
        """The network's params.

        Args:
            decided: what follows from the data and the rest of the recipe; those that the network lacks are 0 or None.
            usually: what stands in for params that are not set.
        """
        params = networks.params_class(self.network.kind)
        known = {field.name for field in dataclasses.fields(params)}
        given = self.network.given()
        for key, value in decided.items():
            if value and key not in known and key != "image_size":
                raise UserError(
                    f"a network of kind '{self.network.kind}' has no '{key}', which the data and the recipe need: set "
                    "network.kind to another network, or leave that input out of the recipe.",
                    key="network.kind",
                    code="unsupported",
                )
            if key in given:
                raise UserError(
                    f"network.{key} follows from the conditioning: leave it out.", key=f"network.{key}", code="conflict"
                )
        usual = {key: value for key, value in (usually or {}).items() if key in known}
        return params(**{**usual, **given, **{key: value for key, value in decided.items() if key in known}})


class DiffusionRecipe(NetworkRecipe):
    """A run that trains a diffusion model.

    Attributes:
        conditioning: what the model is conditioned on.
        codec: in whose latents it works; without one, on pixels.
        upsampling: of a model that enlarges low-resolution images; null: none.
        sampling: how samples are made, in training's previews and by default later.
    """

    kind: Literal["diffusion"] = "diffusion"
    conditioning: Annotated[Conditioning, OneOf(conditions.conditions, "none")] = NoConditioning()
    codec: codecs.LatentCodec = codecs.LatentCodec()
    upsampling: Upsampling | None = None
    network: Backbone = Field(default_factory=lambda: conditions.default_network("unet"))
    objective: Objective = Objective()
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionRecipe:
        if self.sampling.guidance != 1 and (self.conditioning.kind == "none" or self.conditioning.dropout == 0):
            raise UserError(
                f"sampling.guidance={self.sampling.guidance:g} needs a condition that training drops now and then: "
                "set sampling.guidance=1, or conditioning.kind=labels with conditioning.dropout=0.1.",
                key="sampling.guidance",
                code="conflict",
            )
        if self.start is None and self.codec.cache is not None and self.codec.path is None:
            raise UserError("codec.cache holds latents of codec.path: give both.", key="codec.path", code="missing")
        if self.start is not None:
            keys = ["codec.path"] if self.codec.path is not None else []
            keys += ["upsampling"] if self.upsampling is not None else []
            keys += ["objective.predicts"] if self.objective.predicts != Objective().predicts else []
            self._refuse_decided(keys)
        if self.upsampling is not None:
            shrunk_size(self.upsampling.factor, *self.data.resolution)
        return self

    def _check_network(self) -> None:
        if self.codec.path is None and self.conditioning.kind in ("none", "labels"):
            self.network_params(self.expected_slots())

    def expected_slots(self) -> dict[str, int]:
        """The slots of the kinds that come with Carrara, as far as they are known without data: two classes."""
        labels = {"label": 2} if self.conditioning.kind == "labels" else {}
        low_res = {"concat": self.data.channels, "vector": 1} if self.upsampling is not None else {}
        return labels | low_res

    def network_params(self, slots: Mapping[str, int], latent: tuple[int, ...] | None = None) -> Any:
        """The network's params for this recipe's images and conditions.

        Args:
            slots: what the conditioners fill, with widths, see `Conditioner.slots`.
            latent: [C', H', W'] of the codec's latents; None works on the images themselves.

        Raises:
            UserError: params that do not go together, a size that does not fit, or a network without a needed input.
        """
        channels, *size = latent or (self.data.channels, *self.data.resolution)
        classes = slots.get("label")
        decided: dict[str, Any] = {
            "image_size": tuple(size),
            "in_channels": channels,
            "num_classes": classes,
            "null_label": classes is not None and self.conditioning.dropout > 0,
            "concat_channels": slots.get("concat", 0),
            "upsample_concat": self.upsampling is not None,
            "vector_channels": slots.get("vector", 0),
        }
        decided |= {"context_channels": slots["context"]} if "context" in slots else {}
        decided |= {"vocabulary": slots["tokens"]} if "tokens" in slots else {}
        usually = {"transformer_depth": 1, "context_channels": CONTEXT_CHANNELS}  # something has to attend to texts
        return self._params(decided, usually if slots.keys() & {"context", "tokens"} else {})


class ClassifierRecipe(NetworkRecipe):
    """A run that trains a classifier of noisy images, which guides a diffusion model, or of clean ones, which evaluates
    samples."""

    kind: Literal["classifier"]
    network: ClassifierNetwork = Field(default_factory=lambda: conditions.default_network(CLASSIFIER))
    objective: ClassifierObjective = ClassifierObjective()

    def _check_network(self) -> None:
        self.network_params(2)

    def network_params(self, classes: int) -> Any:
        """The network's params for this recipe's images.

        Raises:
            UserError: params that do not go together, or a size that does not fit.
        """
        return self._params(
            {"image_size": self.data.resolution, "in_channels": self.data.channels, "num_classes": classes}
        )


class CodecRecipe(Recipe):
    """A run that trains a codec: a first stage for latent diffusion to work in.

    Attributes:
        codec: its kind and shape; with `start`, what of it is fine-tuned.
        loss: what is minimised.
        discriminator: against which it is trained, where `loss.adversarial` is above 0.
        sampling: how many images a preview shows.
    """

    from_start: ClassVar[str] = "codec"

    kind: Literal["codec"]
    codec: Annotated[codecs.Codec | codecs.TrainedCodec, OneOf(codecs.codecs, "trained", codecs.codec_kind)] = (
        codecs.TrainedCodec()
    )
    loss: codecs.Loss = Field(default_factory=codecs.Loss)
    discriminator: codecs.DiscriminatorSection = Field(default_factory=codecs.DiscriminatorSection)
    sampling: Previews = Previews()

    @model_validator(mode="after")
    def _consistent(self) -> CodecRecipe:
        if self.start is not None and isinstance(self.codec, codecs.Codec):
            self._refuse_decided(sorted(f"codec.{key}" for key in self.codec.model_fields_set))
        if self.start is None and isinstance(self.codec, codecs.TrainedCodec):
            if self.codec.model_fields_set:
                raise UserError(
                    "codec.learn selects what of a trained codec is fine-tuned: give that codec as 'start'.",
                    key="codec.learn",
                    code="conflict",
                )
            kinds = ", ".join(kind for kind in codecs.codecs() if kind != "trained")
            raise UserError(
                f"the recipe lacks codec.kind ({kinds}), or a published shape as codec.preset.",
                key="codec.kind",
                code="missing",
            )
        if isinstance(self.codec, codecs.Codec):
            loss = self.loss.of(self.codec.kind)
            self.codec.config(self.data.channels, self.training.steps * self.training.batch_size)
            if self.discriminator.model_fields_set and not loss.adversarial:
                raise UserError(
                    "discriminator is given, but loss.adversarial is 0: set it above 0, or leave this out.",
                    key="discriminator",
                    code="conflict",
                )
        return self


class ScorerRecipe(Recipe):
    """A run that trains a contrastive scorer of images and captions.

    Attributes:
        encoders: which halves are frozen, and how texts are read.
        network: the towers.
    """

    kind: Literal["scorer"]
    encoders: Encoders = Encoders()
    network: conditions.TowersSection = Field(default_factory=conditions.TowersSection)

    @model_validator(mode="after")
    def _consistent(self) -> ScorerRecipe:
        self._refuse_decided([] if self.start is None else ["start"])
        if self.training.micro_batch is not None:
            raise UserError(
                "training.micro_batch would hide most pairs of a batch from a scorer: leave it out.",
                key="training.micro_batch",
                code="conflict",
            )
        self.towers(image_features=0 if self.encoders.image == "trained" else 1, text_features=1)
        return self

    def towers(self, image_features: int = 0, text_features: int = 0, vocabulary: int = 0) -> TowersParams:
        """The towers' params for these images and texts; see there.

        Raises:
            UserError: params that do not go together.
        """
        return TowersParams(
            image_features=image_features,
            text_features=text_features,
            vocabulary=vocabulary,
            image_size=self.data.resolution,
            image_channels=self.data.channels,
            **self.network.given(),
        )


AnyRecipe = DiffusionRecipe | ClassifierRecipe | CodecRecipe | ScorerRecipe
RUNS: Mapping[str, type[Section]] = {
    "diffusion": DiffusionRecipe,
    "classifier": ClassifierRecipe,
    "codec": CodecRecipe,
    "scorer": ScorerRecipe,
}
RECIPE: TypeAdapter[AnyRecipe] = TypeAdapter(Annotated[AnyRecipe, OneOf(lambda: RUNS, "diffusion", prepare=current)])


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes (draft 2020-12), with the networks and conditioners that are registered."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of Carrara"}
    return head | RECIPE.json_schema()
