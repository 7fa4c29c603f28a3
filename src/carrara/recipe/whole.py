"""A whole run as one validated piece of data, and what in it must go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from carrara.errors import UserError, nearest
from carrara.recipe.params import params_from
from carrara.recipe.sections import (
    Conditioning,
    Data,
    ObjectiveChoice,
    Sampling,
    ScheduleChoice,
    Section,
    Training,
    Upsampling,
)

LEARN = ("all", "decoder")
"""What of a codec may learn on."""
SCALES = ("one", "channel")
"""How many numbers a codec's latent scale is."""


CONTEXT_CHANNELS = 256
"""Width of a jointly trained text encoder, by default."""


class Recipe(Section):
    """A whole run.

    Attributes:
        name: what the run folder is called by default.
        kind: what is trained: a "diffusion" model, a "classifier" of noisy images that guides one, or a "codec" for
            one to work in.
        seed: of the weights, the order, and every draw.
        start: the run or folder of a model, classifier or codec whose weights the run begins from (fine-tuning). What
            it is made for follows from it: network, schedule, prediction, codec and up-sampling of a model, all but
            `learn` of a codec. `network` may change `dropout` and `checkpointing`, where the network has them.
        network: fields of `UNetParams`, or of `EncoderClassifierParams`, without those that data and conditioning
            decide.
        codec: of a diffusion model, `path`: the run or folder of the codec it works in, and `cache`: the folder where
            `carrara data encode` has put the latents. Of a codec, its `kind`
            (autoencoder, vae, kl, vq, vqgan, dvae, gumbel, hierarchical) and the fields of `AutoencoderParams`,
            `QuantiserParams` or `DiscreteParams`, or as its `preset` a published shape, a name of
            `carrara.presets.published_codecs.PRESETS`, of which further keys change single fields; and its `scale`:
            "one" number for all latents, or one for each "channel"; with `start`, what of it shall `learn`: "all", or
            the "decoder" alone, so that every latent stays what it is.
        upsampling: of a diffusion model that is to enlarge small images.
        loss: of a codec, fields of `CodecLoss` where they differ from its kind's own, and `perceptual_from`, a
            classifier's folder or a file of VGG/LPIPS weights, with the file's `perceptual_checksum`.
        discriminator: of a codec, fields of `DiscriminatorParams`.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    kind: Literal["diffusion", "classifier", "codec"] = "diffusion"
    seed: int = Field(0, ge=0, lt=2**64)
    start: str | None = None
    data: Data
    conditioning: Conditioning = Conditioning()
    codec: dict[str, Any] = Field(default_factory=dict)
    upsampling: Upsampling | None = None
    network: dict[str, Any] = Field(default_factory=dict)
    loss: dict[str, Any] = Field(default_factory=dict)
    discriminator: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleChoice = ScheduleChoice()
    objective: ObjectiveChoice = ObjectiveChoice()
    training: Training
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        from carrara import solvers
        from carrara.conditioning import shrunk_size
        from carrara.process import schedules

        schedules.build(self.schedule.spec())
        solvers.named(self.sampling.solver)
        if self.sampling.guidance != 1 and (self.conditioning.kind == "none" or self.conditioning.dropout == 0):
            raise UserError(
                f"sampling.guidance={self.sampling.guidance:g} needs a condition that training drops now and then: "
                "set sampling.guidance=1, or conditioning.kind=labels with conditioning.dropout=0.1."
            )
        self._refuse_other_kinds_keys()
        self._refuse_codec_keys()
        if self.start is not None:
            self._refuse_what_the_start_decides()
        if self.upsampling is not None:
            shrunk_size(self.upsampling.factor, *self.data.resolution)
        if self.kind != "codec" and self.start is None and not self.codec:
            self._check_network()
        return self

    def _refuse_other_kinds_keys(self) -> None:
        """What this kind of run does not take is not silently ignored."""
        nothing: dict[str, Any] = {
            "conditioning": Conditioning(),
            "codec": {},
            "upsampling": None,
            "network": {},
            "loss": {},
            "discriminator": {},
            "schedule": ScheduleChoice(),
            "objective": ObjectiveChoice(),
            "sampling": Sampling(),
        }
        takes, but = {
            "diffusion": (nothing.keys() - {"loss", "discriminator"}, {}),
            "classifier": ({"network", "schedule"}, {"objective": "times"}),
            "codec": ({"codec", "loss", "discriminator"}, {"sampling": "count"}),
        }[self.kind]
        for key in nothing.keys() - takes:
            given = getattr(self, key)
            if key in but:
                given = given.model_copy(update={but[key]: getattr(nothing[key], but[key])})
            if given != nothing[key]:
                rest = f" but {key}.{but[key]}" if key in but else ""
                raise UserError(f"a recipe of kind {self.kind} takes nothing in '{key}'{rest}: leave it out.")
        if self.objective.times.kind == "clean" and self.kind != "classifier":
            raise UserError("objective.times of kind 'clean' holds no noise to learn from: it is for kind: classifier.")

    def _refuse_codec_keys(self) -> None:
        """Of a trained codec there is nothing to choose but which, and what of it learns on."""
        named = not self.codec or ("path" in self.codec and not self.codec.keys() - {"path", "cache"})
        if self.kind == "diffusion" and self.start is None and not named:
            raise UserError(
                "a diffusion model takes a codec that is trained: give codec.path, and codec.cache where its latents "
                "are cached."
            )
        if self.kind != "codec":
            return
        scale = self.codec.get("scale", SCALES[0])
        if scale not in SCALES:
            raise UserError(f"codec.scale is '{scale}': {nearest(str(scale), SCALES)}")
        if "learn" in self.codec:
            if self.start is None:
                raise UserError("codec.learn says what of a trained codec learns on: give that codec as 'start'.")
            if self.codec["learn"] not in LEARN:
                raise UserError(f"codec.learn is '{self.codec['learn']}': {nearest(str(self.codec['learn']), LEARN)}")

    def _refuse_what_the_start_decides(self) -> None:
        decided = [f"network.{key}" for key in self.network if key not in ("dropout", "checkpointing")]
        kept = {"diffusion": "cache", "codec": "learn"}.get(self.kind)
        decided += [f"codec.{key}" for key in self.codec if key != kept]
        decided += ["upsampling"] if self.upsampling is not None else []
        decided += ["schedule"] if self.schedule != ScheduleChoice() else []
        decided += ["objective.predicts"] if self.objective.predicts != ObjectiveChoice().predicts else []
        if decided:
            begun = "codec" if self.kind == "codec" else "model"
            raise UserError(
                f"{decided[0]} follows from the {begun} that the run starts from, {self.start}: leave it out."
            )

    def _check_network(self) -> None:
        """Raises UserError unless the network can be made, as far as is known without data."""
        from carrara import networks

        if "kind" in self.network:
            networks.params_class(self.network["kind"])
        if self.conditioning.kind in ("none", "labels"):
            self.network_params(self.expected_slots())

    def expected_slots(self) -> dict[str, int]:
        """The slots of the kinds that come with Carrara, as far as they are known without data: two classes."""
        labels = {"label": 2} if self.kind == "classifier" or self.conditioning.kind == "labels" else {}
        low_res = {"concat": self.data.channels, "vector": 1} if self.upsampling is not None else {}
        return labels | low_res

    def network_params(self, slots: Mapping[str, int], latent: tuple[int, ...] | None = None) -> Any:
        """The network's params for this recipe's images and conditions.

        Args:
            slots: what the conditioners fill, with widths, see `Conditioner.slots`; of a classifier "label" alone.
            latent: [C', H', W'] of the codec's latents; None works on the images themselves.

        Raises:
            UserError: an unknown or decided-elsewhere key, a wrong type, or a size that does not fit.
        """
        import dataclasses

        from carrara import networks

        channels, *size = latent or (self.data.channels, *self.data.resolution)
        classes = slots.get("label")
        decided: dict[str, Any] = {"image_size": tuple(size), "in_channels": channels, "num_classes": classes}
        if self.kind != "classifier":
            decided["null_label"] = classes is not None and self.conditioning.dropout > 0
            decided["concat_channels"] = slots.get("concat", 0)
            decided |= {"upsample_concat": self.upsampling is not None, "vector_channels": slots.get("vector", 0)}
            decided |= {"context_channels": slots["context"]} if "context" in slots else {}
            decided |= {"vocabulary": slots["tokens"]} if "tokens" in slots else {}
        usual = "encoder_classifier" if self.kind == "classifier" else "unet"
        kind = self.network.get("kind", usual)
        params = networks.params_class(kind)
        if "encoder_classifier" in (kind, usual) and kind != usual:
            raise UserError(
                f"network.kind '{kind}' does not fit a recipe of kind {self.kind}.", key="network.kind", code="mismatch"
            )
        known = {field.name for field in dataclasses.fields(params)}
        for key, value in decided.items():
            if value and key not in known and key != "image_size":
                raise UserError(
                    f"a network of kind '{kind}' has no '{key}', which the data and the recipe need: set network.kind "
                    "to another network, or leave that input out of the recipe.",
                    key="network.kind",
                    code="unsupported",
                )
        given = {key: value for key, value in self.network.items() if key != "kind"}
        own = {key: value for key, value in decided.items() if key in known}
        if slots.keys() & {"context", "tokens"}:  # something has to attend to them
            usually = {"transformer_depth": 1, "context_channels": CONTEXT_CHANNELS}
            given = {key: value for key, value in usually.items() if key in known - own.keys()} | given
        return params_from(params, given, own)

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
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
