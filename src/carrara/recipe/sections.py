"""The sections that runs have in common: data, training, previews; and the up-sampling of a diffusion model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from carrara import solvers
from carrara.data import Preprocess
from carrara.errors import UserError
from carrara.recipe.section import Section

Side = Annotated[int, Field(ge=1)]
Size = tuple[Side, Side]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _known_solver(word: str) -> str:
    solvers.named(word)
    return word


def _square(value: Any) -> Any:
    return (value, value) if type(value) is int else value


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
        unreadable_limit: fraction of unreadable images that is skipped; more are refused.
        order: "samples" shuffles all; "shards" reads a few tar shards at a time and shuffles within them, for disks
            and networks where reading here and there is slow.
        workers: processes that decode images; 0 decodes in this one, as for images that are kept.
        cache: whether images are kept in memory, decoded and brought to size, after their first use: "auto" where all
            fit in 512 MiB, "memory" always, "none" never.
    """

    path: str | None = None
    about: str = ""
    split: str = "train"
    resolution: Annotated[Size, BeforeValidator(_square, json_schema_input_type=Side | Size)]
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

    @model_validator(mode="after")
    def _one_order(self) -> Data:
        if self.buckets is not None and self.order == "shards":
            raise UserError(
                "data.buckets gather like shapes from all shards: leave out data.order=shards.",
                key="data.order",
                code="conflict",
            )
        return self

    def preprocess(self, augment: bool = False) -> Preprocess:
        """How an image becomes a sample; with crop and flip as training draws them, or without any choice."""
        drawn: dict[str, Any] = {"crop": self.crop, "flip": self.flip} if augment else {}
        return Preprocess(*self.resolution, self.channels, resize=self.resize, **drawn)


class Encoders(Section):
    """What a scorer reads images and texts with.

    Attributes:
        image: "trained", or "efficientnet-lite0", whose frozen features come from its package.
        text: "trained", "minilm", whose frozen weights come from its package, or the folder of a text encoder of
            transformers, which is frozen.
        vocabulary: entries of the trained text encoder's vocabulary, at most; at least 259.
        length: tokens of a text, those around it included.
    """

    image: Literal["trained", "efficientnet-lite0"] = "trained"
    text: str = "trained"
    vocabulary: int = Field(4096, ge=259)
    length: int = Field(48, ge=3)


class Upsampling(Section):
    """Super-resolution: the model makes an image of `data.resolution` of one that is smaller.

    Attributes:
        factor: how many times smaller each side of the low-resolution image is: each of its pixels is the mean of
            factor × factor pixels. In a codec's latents at least the codec's reduction.
        noise: the most noise that the low-resolution images get in training, so that the model does not trust every
            pixel of what another one made: a fraction of the cosine schedule, 0 none, 1 nothing but noise. Sampling may
            take any level up to it (`DiffusionModel.sample(noise_level=…)`).
    """

    factor: int = Field(4, ge=2)
    noise: float = Field(0.25, ge=0, le=1)


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


class Previews(Section):
    """What is shown while training.

    Attributes:
        count: how many pictures a preview shows.
    """

    count: int = Field(16, ge=1)


class Sampling(Previews):
    """How samples are made, in training's previews and by default later.

    Attributes:
        solver: a word of `carrara.solvers.SOLVERS`.
        steps: pairs of the grid.
        spacing: a word of `carrara.solvers.WORDS`.
        guidance: classifier-free scale; 1 is the plain conditional model.
        seed: picture k of a preview is row k of this seed.
    """

    solver: Annotated[str, AfterValidator(_known_solver)] = "dpm++2m"
    steps: int = Field(20, ge=1)
    spacing: Literal["leading", "trailing", "linspace", "quadratic", "karras", "log_snr", "optimised"] = "trailing"
    guidance: float = 1.0
    seed: int = Field(0, ge=0)
