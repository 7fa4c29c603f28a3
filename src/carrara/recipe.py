"""A whole run as data: typed, validated, read from YAML. Nothing in a recipe can name code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from carrara.errors import UserError, nearest

Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Section):
    """Which images, and how they are brought to size.

    Attributes:
        path: a folder, file, archive or data set; or "digits", scikit-learn's scanned digits.
        split: which split, where the data has several.
        resolution: one side of a square, or [height, width]. The shorter side is resized, the rest cropped.
        buckets: sizes for pictures of several shapes: each batch holds pictures of like shape, cut to the nearest of
            these [height, width]; "auto" takes all sizes of `resolution`'s area from 1:2 to 2:1; null cuts every
            picture to `resolution`.
        channels: 1 gray, 3 colour, 4 colour with transparency.
        resize: the filter: "adm" (reduce by boxes, then bicubic), "bicubic", "lanczos", "box", "nearest".
        crop: "center" or "random".
        flip: mirror half of the images. Off by default: digits, text and logos are not symmetric.
        caption_column: which column or key holds the captions, where the usual names do not fit.
        unreadable_limit: share of unreadable images that is skipped; more are refused.
        order: "samples" shuffles all; "shards" reads a few tar shards at a time and shuffles within them, for disks
            and networks where reading here and there is slow.
        workers: processes that decode images; 0 decodes in this one.
    """

    path: str
    split: str = "train"
    resolution: Size
    buckets: Literal["auto"] | Annotated[tuple[Size, ...], Field(min_length=1)] | None = None
    channels: Literal[1, 3, 4] = 3
    resize: Literal["adm", "bicubic", "lanczos", "box", "nearest"] = "adm"
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_column: str | None = None
    unreadable_limit: float = Field(0.01, ge=0, le=1)
    order: Literal["samples", "shards"] = "samples"
    workers: int = Field(0, ge=0)

    @field_validator("resolution", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _one_order(self) -> Data:
        if self.buckets is not None and self.order == "shards":
            raise UserError("data.buckets gather like shapes from all shards: leave out data.order=shards.")
        return self


class Conditioning(_Section):
    """What the model is told.

    Attributes:
        kind: "none", or "labels": the class of every image.
        dropout: share of samples whose condition is dropped in training, so that the model can be guided
            classifier-free; 0 trains no null condition.
    """

    kind: Literal["none", "labels"] = "none"
    dropout: float = Field(0.1, ge=0, lt=1)


class ScheduleChoice(_Section):
    """The noise schedule; arguments that its kind does not take are refused."""

    kind: Literal["linear", "scaled_linear", "cosine", "sigmoid", "edm", "rectified_flow", "vp_sde"] = "cosine"
    steps: int | None = Field(None, ge=2)
    beta_start: float | None = None
    beta_end: float | None = None
    start: float | None = None
    end: float | None = None
    tau: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift: float | None = None
    beta_min: float | None = None
    beta_max: float | None = None
    zero_terminal_snr: bool = False

    def spec(self) -> dict[str, object]:
        """The plain data from which `schedules.build` makes the schedule."""
        spec: dict[str, object] = {
            k: v for k, v in self.model_dump(exclude={"zero_terminal_snr"}).items() if v is not None
        }
        return {"kind": "zero_terminal_snr", "schedule": spec} if self.zero_terminal_snr else spec


class WeightChoice(_Section):
    """How much each noise level counts (`carrara.objectives.Weight`).

    Attributes:
        kind: "uniform" (L_simple), "min_snr", "p2" or "edm".
        gamma: γ of min_snr.
        floor: no level weighs less.
    """

    kind: Literal["uniform", "min_snr", "p2", "edm"] = "uniform"
    gamma: float = Field(5.0, gt=0)
    floor: float = Field(0.0, ge=0)


class TimesChoice(_Section):
    """Which noise levels are visited (`carrara.objectives.times`); arguments that its kind does not take are refused.

    Attributes:
        kind: "uniform", "logit_normal", "log_normal", "loss_aware", or "clean": no noise at all, for a classifier
            that is to judge samples.
        mean, spread: of the two normal kinds.
        history, uniform: losses that each level remembers, and the share spread evenly, of the loss-aware kind.
    """

    kind: Literal["uniform", "logit_normal", "log_normal", "loss_aware", "clean"] = "uniform"
    mean: float | None = None
    spread: float | None = Field(None, gt=0)
    history: int | None = Field(None, ge=1)
    uniform: float | None = Field(None, gt=0, le=1)

    def arguments(self) -> dict[str, Any]:
        """What was given beside the kind."""
        return self.model_dump(exclude={"kind"}, exclude_none=True)

    @model_validator(mode="after")
    def _taken(self) -> TimesChoice:
        normal, aware = ("mean", "spread"), ("history", "uniform")
        takes = {"logit_normal": normal, "log_normal": normal, "loss_aware": aware}.get(self.kind, ())
        for key in self.arguments():
            if key not in takes:
                raise UserError(f"objective.times of kind '{self.kind}' take no '{key}': leave it out.")
        return self


class ObjectiveChoice(_Section):
    """What is minimised.

    Attributes:
        predicts: what the network tells: "eps", "x0", "v", "flow" or "edm".
        loss: "simple", the weighted squared error; "vlb", the variational bound; "hybrid", the first plus
            `vlb_weight` times the second, for a network with `network.learned_variance`.
    """

    predicts: Literal["eps", "x0", "v", "flow", "edm"] = "eps"
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    vlb_weight: float = Field(1e-3, gt=0)
    weight: WeightChoice = WeightChoice()
    times: TimesChoice = TimesChoice()


class Training(_Section):
    """How it is minimised. A step is one optimiser step; all counts are totals, not "more".

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: images of one optimiser step, over all processes.
        micro_batch: images that one process works on at once, the gradients being added up; null takes its whole
            share of the batch, "auto" halves that until it fits into memory.
        learning_rate: as it is, never multiplied behind the user's back.
        warmup: steps over which the learning rate rises linearly from 0.
        decay: "constant", "cosine" (to 0 at the last step), or "inverse_sqrt" (falls as 1/√step after the
            warm-up).
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: largest norm of the gradient; larger ones are scaled down.
        ema: decay of the running mean of the weights (kept in float32); early steps use (1 + step)/(10 + step)
            where that is smaller, so that it does not remember the initial weights. Of several decays the first
            is what samples are made from.
        power_ema: relative widths σ_rel of EDM2's power-function means, for re-weighting after the run.
        power_ema_every: steps between the stored snapshots of those means.
        precision: "fp32", or "bf16" or "fp16" (with a loss scale) for the network's forward and backward pass.
        parallel: what several processes share: "ddp" the batch, "fsdp" the weights too.
        compile: let torch.compile translate the network.
        log_every, checkpoint_every, sample_every: in steps.
        validate_every: steps between losses on `validation_split`; 0 takes none.
        validation_split, validation_images: which images, and how many, the same with the same noise each time.
        keep_checkpoints: how many of the newest are kept.
        keep_every: checkpoints of every so many steps are kept for good; 0 keeps none.
        tracker: "tensorboard", "wandb" or "none"; log.jsonl is always written.
        stuck_after: seconds in one phase after which the watchdog names it.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    learning_rate: float = Field(2e-4, gt=0)
    warmup: int = Field(100, ge=0)
    decay: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(1.0, gt=0)
    ema: Decay | Annotated[tuple[Decay, ...], Field(min_length=1)] = 0.999
    power_ema: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = ()
    power_ema_every: int = Field(1000, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    sample_every: int = Field(1000, ge=1)
    validate_every: int = Field(0, ge=0)
    validation_split: str = "test"
    validation_images: int = Field(512, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    stuck_after: float = Field(300, gt=0)

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays of the running means, that of the samples first."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)


class Sampling(_Section):
    """How samples are made, in training's previews and by default later.

    Attributes:
        solver: a word of `carrara.solvers.SOLVERS`.
        steps: pairs of the grid.
        spacing: a constructor of `carrara.process.grids`.
        guidance: classifier-free scale; 1 is the plain conditional model.
        count: how many pictures a preview shows.
        seed: picture k of a preview is row k of this seed.
    """

    solver: str = "dpm++2m"
    steps: int = Field(20, ge=1)
    spacing: Literal["leading", "trailing", "linspace", "quadratic", "karras", "log_snr"] = "trailing"
    guidance: float = 1.0
    count: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)


class Recipe(_Section):
    """A whole run.

    Attributes:
        name: what the run folder is called by default.
        kind: what is trained: a "diffusion" model, a "classifier" of noisy images that guides one, or a "codec" for
            one to work in.
        seed: of the weights, the order, and every draw.
        start: a model or classifier folder whose weights the run begins from (fine-tuning). Network, schedule and
            what the network predicts are then that model's; `network` may change `dropout` and `checkpointing`.
        network: fields of `UNetParams`, or of `EncoderClassifierParams`, without those that data and conditioning
            decide.
        codec: of a diffusion model, `path`: the run or folder of the codec it works in, and `cache`: the folder where
            `carrara data encode` has put the latents. Of a codec, its `kind`
            (autoencoder, vae, kl, vq, vqgan, dvae, hierarchical) and the fields of `AutoencoderParams`,
            `QuantiserParams` or `DiscreteParams`.
        loss: of a codec, fields of `CodecLoss` where they differ from its kind's own, and `perceptual_from`, a
            classifier's folder or a file of VGG/LPIPS weights, with the file's `perceptual_checksum`.
        discriminator: of a codec, fields of `DiscriminatorParams`.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    kind: Literal["diffusion", "classifier", "codec"] = "diffusion"
    seed: int = Field(0, ge=0)
    start: str | None = None
    data: Data
    conditioning: Conditioning = Conditioning()
    codec: dict[str, Any] = Field(default_factory=dict)
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
        from carrara.process import schedules

        schedules.build(self.schedule.spec())
        solvers.named(self.sampling.solver)
        if self.sampling.guidance != 1 and (self.conditioning.kind == "none" or self.conditioning.dropout == 0):
            raise UserError(
                f"sampling.guidance={self.sampling.guidance:g} needs a condition that training drops now and then: "
                "set sampling.guidance=1, or conditioning.kind=labels with conditioning.dropout=0.1."
            )
        self._refuse_other_kinds_keys()
        if self.kind == "codec":
            return self
        if self.start is not None:
            self._refuse_what_the_start_decides()
        elif "path" not in self.codec:
            self.network_params(2 if self.kind == "classifier" or self.conditioning.kind == "labels" else None)
        return self

    def _refuse_other_kinds_keys(self) -> None:
        """What this kind of run does not take is not silently ignored."""
        nothing: dict[str, Any] = {
            "conditioning": Conditioning(),
            "codec": {},
            "network": {},
            "loss": {},
            "discriminator": {},
            "schedule": ScheduleChoice(),
            "objective": ObjectiveChoice(),
            "sampling": Sampling(),
        }
        takes, but = {
            "diffusion": ({"conditioning", "codec", "network", "schedule", "objective", "sampling"}, {}),
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
        if (
            self.kind == "diffusion"
            and self.codec
            and (self.codec.keys() - {"path", "cache"} or "path" not in self.codec)
        ):
            raise UserError(
                "a diffusion model takes a codec that is trained: give codec.path, and codec.cache where its latents "
                "are cached."
            )
        if self.objective.times.kind == "clean" and self.kind != "classifier":
            raise UserError("objective.times of kind 'clean' holds no noise to learn from: it is for kind: classifier.")
        if self.start is not None and self.kind == "codec":
            raise UserError("a codec's run cannot start from another yet: leave out 'start'.")

    def _refuse_what_the_start_decides(self) -> None:
        decided = [f"network.{key}" for key in self.network if key not in ("dropout", "checkpointing")]
        decided += ["schedule"] if self.schedule != ScheduleChoice() else []
        decided += ["objective.predicts"] if self.objective.predicts != ObjectiveChoice().predicts else []
        if decided:
            raise UserError(
                f"{decided[0]} follows from the model that the run starts from, {self.start}: leave it out."
            )

    def network_params(self, classes: int | None, latent: tuple[int, int, int] | None = None) -> Any:
        """The network's params for this recipe's images and a number of classes.

        Args:
            latent: [C', H', W'] of the codec's latents; None works on the images themselves.

        Raises:
            UserError: an unknown or decided-elsewhere key, a wrong type, or a size that does not fit.
        """
        from carrara.networks import EncoderClassifierParams, UNetParams

        channels, *size = latent or (self.data.channels, *self.data.resolution)
        decided = {"image_size": tuple(size), "in_channels": channels, "num_classes": classes}
        if self.kind == "classifier":
            return params_from(EncoderClassifierParams, self.network, decided)
        null = classes is not None and self.conditioning.dropout > 0
        return params_from(UNetParams, self.network, {**decided, "null_label": null})

    def to_yaml(self) -> str:
        """The recipe as YAML that `load` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def params_from(kind: type, given: Mapping[str, Any], decided: Mapping[str, Any], section: str = "network") -> Any:
    """A params dataclass from a section's keys and from what the rest of the recipe decides.

    Raises:
        UserError: an unknown key, one that is decided elsewhere, or a wrong type.
    """
    import dataclasses

    from pydantic import TypeAdapter

    known = {field.name for field in dataclasses.fields(kind)}
    for key in given:
        if key in decided:
            raise UserError(f"{section}.{key} follows from the data and the conditioning: leave it out.")
        if key not in known:
            raise UserError(f"the recipe has an unknown key '{section}.{key}': {nearest(key, known - decided.keys())}")
    try:
        return TypeAdapter(kind).validate_python({**given, **decided})
    except ValidationError as error:
        raise UserError(_sentence(error, f"{section}.")) from None


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys that a recipe may hold at a place."""
    model: Any = Recipe
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _sentence(error: ValidationError, prefix: str = "") -> str:
    """The first of pydantic's complaints as one sentence that names the key."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = prefix + ".".join(path)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        return f"the recipe has an unknown key '{key}': {nearest(path[-1], _known_keys(path[:-1]))}"
    if first["type"] == "missing":
        return f"the recipe lacks the key '{key}': add it, or use --set {key}=VALUE."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"the recipe's '{key}' is {first['input']!r}, but {message}."


def validate(data: Mapping[str, Any], origin: str = "the recipe") -> Recipe:
    """A recipe from plain data.

    Raises:
        UserError: names the first wrong key, and for an unknown one the nearest known.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(_sentence(error).replace("the recipe", origin, 1)) from None


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `section.key=value` assignments, values being YAML, to plain recipe data (a changed copy).

    Raises:
        UserError: an assignment without "=", or a path through something that is no section.
    """
    import copy

    data = copy.deepcopy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(f"--set {assignment} is not of the form section.key=value.")
        *sections, key = path.strip().split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {assignment}: '{section}' is a value, not a section of the recipe.")
        try:
            place[key] = _plain(yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: '{text}' cannot be read as a YAML value.") from None
    return data


def _plain(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; a recipe means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def shipped() -> list[str]:
    """The names of the recipes that come with Carrara."""
    folder = resources.files("carrara") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read(name: str | Path) -> dict[str, Any]:
    """The plain data of a shipped recipe, or of a YAML file.

    Raises:
        UserError: neither a shipped recipe nor a readable YAML mapping.
    """
    if isinstance(name, str) and name in shipped():
        text = (resources.files("carrara") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no recipe '{name}': {nearest(str(name), shipped())}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the recipe {path} cannot be read: {error}.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {name} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise UserError(f"the recipe {name} holds no sections: it must be a YAML mapping.")
    plain: dict[str, Any] = _plain(data)
    return plain


def load(name: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """A shipped recipe or a YAML file, with overrides, validated."""
    return validate(override(read(name), assignments), f"the recipe {name}")
