"""The sections of a recipe: what each may say, and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from carrara.errors import UserError, nearest

Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Typed data: an unknown key is refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes and no as True and False, which would be 1 and 0."""
        field = cls.model_fields.get(info.field_name or "")
        leaves = _leaves(field.annotation) if field is not None else set()
        if isinstance(value, bool) and leaves & {int, float} and bool not in leaves:
            raise PydanticCustomError("number", "a number is needed, not yes or no")
        return value


def _leaves(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*(_leaves(part) for part in parts))


class Data(Section):
    """Which images, and how they are brought to size.

    Attributes:
        path: a folder, file, archive or data set; or "digits", scikit-learn's scanned digits. Shipped recipes whose
            images are your own leave it out: `carrara train RECIPE --data PATH`.
        about: which images the recipe is for, where it names none.
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
        workers: processes that decode images; 0 decodes in this one, as for images that are kept.
        cache: whether images are kept in memory, decoded and brought to size, after their first use: "auto" where all
            fit in 512 MiB, "memory" always, "none" never.
    """

    path: str | None = None
    about: str = ""
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
    cache: Literal["auto", "memory", "none"] = "auto"

    @field_validator("resolution", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if type(value) is int else value

    @model_validator(mode="after")
    def _one_order(self) -> Data:
        if self.buckets is not None and self.order == "shards":
            raise UserError("data.buckets gather like shapes from all shards: leave out data.order=shards.")
        return self


class Conditioning(Section):
    """What the model is conditioned on.

    Attributes:
        kind: "none", "labels" (the class of every image), or a kind of conditioner that you registered, whose own
            settings may follow.
        dropout: fraction of samples whose condition is dropped in training, so that the model can be guided
            classifier-free; 0 trains no null condition.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    kind: str = "none"
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _known(self) -> Conditioning:
        from carrara.conditioning import KINDS

        shipped = ("none", "labels")
        known = {*shipped, *KINDS} - {"low_res"}  # the section `upsampling` makes that one
        if self.kind not in known:
            raise UserError(
                f"the recipe's conditioning.kind is '{self.kind}': {nearest(self.kind, known)}",
                key="conditioning.kind",
                code="unknown",
            )
        for key in self.model_extra or {}:
            if self.kind in shipped:
                raise UserError(
                    f"the recipe has an unknown key 'conditioning.{key}': {nearest(key, type(self).model_fields)}",
                    key=f"conditioning.{key}",
                    code="unknown",
                )
        return self


class Upsampling(Section):
    """Super-resolution: the model makes an image of `data.resolution` of one that is smaller.

    Attributes:
        factor: how many times smaller each side of the small image is: each of its pixels is the mean of
            factor × factor pixels. In a codec's latents at least the codec's reduction.
        noise: the most noise that the small images get in training, so that the model does not trust every pixel of
            what another one made: a share of the cosine schedule, 0 none, 1 nothing but noise. Sampling may take any
            level up to it (`DiffusionModel.sample(noise_level=…)`).
    """

    factor: int = Field(4, ge=2)
    noise: float = Field(0.25, ge=0, le=1)


class ScheduleChoice(Section):
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


class WeightChoice(Section):
    """How much each noise level counts (`carrara.objectives.Weight`).

    Attributes:
        kind: "uniform" (L_simple), "min_snr", "p2" or "edm".
        gamma: γ of min_snr.
        floor: no level weighs less.
    """

    kind: Literal["uniform", "min_snr", "p2", "edm"] = "uniform"
    gamma: float = Field(5.0, gt=0)
    floor: float = Field(0.0, ge=0)


class TimesChoice(Section):
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


class ObjectiveChoice(Section):
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


class Training(Section):
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
        stuck_after: seconds in one phase, without a pass of the network, after which the watchdog names it.
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


class Sampling(Section):
    """How samples are made, in training's previews and by default later.

    Attributes:
        solver: a word of `carrara.solvers.SOLVERS`.
        steps: pairs of the grid.
        spacing: a word of `carrara.solvers.WORDS`.
        guidance: classifier-free scale; 1 is the plain conditional model.
        count: how many pictures a preview shows.
        seed: picture k of a preview is row k of this seed.
    """

    solver: str = "dpm++2m"
    steps: int = Field(20, ge=1)
    spacing: Literal["leading", "trailing", "linspace", "quadratic", "karras", "log_snr", "optimised"] = "trailing"
    guidance: float = 1.0
    count: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)
