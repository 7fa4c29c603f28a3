"""A low-resolution image as a condition: super-resolution by diffusion.

The network gets x_t and, up-sampled to its size and concatenated along the channels, the low-resolution image (Saharia
et al. 2021; Ho et al. 2021, "Cascaded Diffusion Models", §4; `UNetParams.concat_channels`, `upsample_concat`). So that
it does not trust every pixel of an image that another model made, that image gets noise of a random level in training,
and the network is conditioned on the level (conditioning augmentation, there §4.2). The same condition trains a decoder
without an autoencoder (docs/math.md §8): large images from small ones, or latents of the large from the small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.condition import Condition
from carrara.conditioning.base import DROPOUT, DataFacts, Input, TrainingInputs
from carrara.entries import construct, typed
from carrara.errors import UserError, nearest
from carrara.process import schedules
from carrara.process.noise import Noise
from carrara.process.schedules import Discrete, Schedule, Time
from carrara.process.transitions import diffuse

LevelSlot = Literal["vector", "label"]

LEVEL, IMAGE = DROPOUT + 1, DROPOUT + 2
"""The sub-draws of the noise level, and of the low-resolution image's noise."""


@dataclass(frozen=True)
class NoiseAugmentation:
    """Noise on the low-resolution image, and how the network is conditioned on its level.

    Attributes:
        schedule: the noise levels of the low-resolution image.
        highest: the largest level in schedule time; 0 adds no noise.
        slot: "vector": the level as a fraction of the schedule's final time, in one channel of `Condition.vector`
            (`UNetParams.vector_channels=1`); "label": the whole level, counted from 0 for time 1, as
            `Condition.label` (Stable Diffusion's up-sampler: 1000 labels, highest 350).

    Raises:
        UserError: a level outside of the schedule, or labels for one without whole levels.
    """

    schedule: Schedule
    highest: float
    slot: LevelSlot = "vector"

    def __post_init__(self) -> None:
        if self.slot not in get_args(LevelSlot):
            known = nearest(self.slot, get_args(LevelSlot))
            raise UserError(f"a noise level has no slot '{self.slot}': {known}", key="slot", code="unknown")
        least = 1.0 if self.slot == "label" else 0.0
        if not least <= self.highest <= self.schedule.final_time:
            raise UserError(
                f"the highest level lies in {least:g}..{self.schedule.final_time:g}, {self.highest:g} does not.",
                key="highest",
            )
        if self.slot == "label" and not isinstance(self.schedule, Discrete):
            raise UserError(
                "a level is a label on a discrete schedule only: use slot='vector'.", key="slot", code="conflict"
            )

    @classmethod
    def up_to(cls, fraction: float) -> Self:
        """Levels up to a fraction of the cosine schedule: whatever schedule the large image has, the low-resolution
        one is α·image + σ·ε with α = cos(fraction·π/2) (up to the schedule's offset) and α² + σ² = 1.

        Raises:
            UserError: a fraction outside 0..1.
        """
        schedule = schedules.cosine(1000)
        return cls(schedule, fraction * schedule.final_time)

    @property
    def fraction(self) -> float:
        """The highest level as a fraction of the schedule's final time."""
        return self.highest / self.schedule.final_time

    def levels(self, uniform: Tensor) -> Tensor:
        """Levels of uniform numbers in (0, 1): schedule times [B] up to the highest, the lowest of them no noise; of
        labels whole times from 1."""
        if self.slot == "label":
            return 1 + (uniform * int(self.highest)).floor()
        return self._floored(uniform * self.highest)

    def level(self, fraction: float) -> Tensor:
        """The level of a fraction of the schedule's final time, for sampling: a schedule time [1], as `levels` gives.

        Raises:
            UserError: more noise than training had, or less than none.
        """
        if not 0 <= fraction <= self.fraction:
            raise UserError(
                f"noise_level is {fraction:g}, and this model was trained with 0..{self.fraction:g}.", key="noise_level"
            )
        times = torch.tensor([fraction * self.schedule.final_time], dtype=torch.float64)
        return times.round().clamp(min=1) if self.slot == "label" else self._floored(times)

    def _floored(self, times: Tensor) -> Tensor:
        """No noise below the schedule's first level."""
        return torch.where(times < self.schedule.first_time, 0.0, times)

    def condition(self, images: Tensor, level: Time, noise: Tensor | Noise) -> Condition:
        """The condition of low-resolution images.

        Args:
            images: [B, C, h, w] in [-1, 1].
            level: schedule time of the noise, one or [B]; 0 adds none.
            noise: standard normal of the images' shape, or the samples' noise by address.

        Raises:
            UserError: a level that is no label.
        """
        times = torch.as_tensor(level, dtype=torch.float64).reshape(-1).expand(len(images))
        eps = noise.like(images, sub=IMAGE) if isinstance(noise, Noise) else noise
        noisy = diffuse(self.schedule, images, times, eps)
        if self.slot == "vector":
            return Condition(concat=noisy, vector=(times / self.schedule.final_time).to(images)[:, None])
        if bool((times < 1).any()) or bool((times != times.round()).any()):
            raise UserError("a level that is a label is a whole time from 1 on.", key="noise_level")
        return Condition(concat=noisy, label=(times - 1).long().to(images.device))


@dataclass(frozen=True)
class LowRes:
    """The low-resolution image of an up-sampler; never dropped.

    Attributes:
        shape: [C, H, W] of the large images.
        factor: how many times smaller each side of the low-resolution image is; None for the up-samplers of other
            programs, which do not store it: then any that divides the sides.
        augmentation: the noise that the low-resolution images had in training; None where that is not stored.
    """

    kind: ClassVar[str] = "low_res"
    declared: ClassVar[tuple[Input, ...]] = (
        Input("low_res", "image", "the low-resolution images to enlarge"),
        Input(
            "noise_level",
            "number",
            "noise on the low-resolution images, as a fraction of its schedule: 0 (default) trusts every pixel",
            per_sample=False,
            required=False,
            low=0.0,
        ),
    )
    dropout: ClassVar[float] = 0.0
    shape: tuple[int, ...]
    factor: int | None = None
    augmentation: NoiseAugmentation | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        image, level = self.declared
        shape = None if self.factor is None else (self.shape[0], *shrunk_size(self.factor, *self.shape[1:]))
        high = None if self.augmentation is None else self.augmentation.fraction
        return replace(image, shape=shape), replace(level, high=high)

    @property
    def slots(self) -> dict[str, int]:
        if self.augmentation is None:
            return {"concat": self.shape[0]}
        width = int(self.augmentation.schedule.final_time) if self.augmentation.slot == "label" else 1
        return {"concat": self.shape[0], self.augmentation.slot: width}

    def encode(self, inputs: Mapping[str, Any], noise: Noise) -> Condition:
        """`low_res` is float [B, C, h, w] in [-1, 1]; `noise_level` a fraction, 0 by default: what another model made
        is better not trusted to the pixel (0.1, say)."""
        images, level = inputs["low_res"].to(torch.float32), float(inputs.get("noise_level") or 0.0)
        self._check(images)
        if self.augmentation is not None:
            return self.augmentation.condition(images, self.augmentation.level(level), noise)
        if level:
            raise UserError(
                "this up-sampler was trained without noise on its low-resolution images: leave noise_level at 0.",
                key="noise_level",
                code="unsupported",
            )
        return Condition(concat=images)

    def examples(self, batch: TrainingInputs, noise: Noise) -> Condition:
        """The images made smaller, with noise of a random level."""
        if batch.images is None or self.factor is None or self.augmentation is None:
            raise UserError(
                "up-sampling is trained on images, from which it makes the low-resolution ones, with a factor and a "
                "noise: cached latents have no pixels.",
                key="upsampling",
                code="conflict",
            )
        level = self.augmentation.levels(noise.uniform((len(batch.images),), sub=LEVEL))
        return self.augmentation.condition(shrink(batch.images, self.factor), level, noise)

    def null(self, condition: Condition) -> Condition:
        return condition

    def config(self) -> dict[str, Any]:
        noise = self.augmentation
        about = noise and {"schedule": noise.schedule.spec, "highest": noise.highest, "slot": noise.slot}
        return {"shape": list(self.shape), "factor": self.factor, "noise": about}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        noise = typed(config["noise"], dict | None, "low_res.noise")
        if noise is not None:
            noise = construct(NoiseAugmentation, {**noise, "schedule": schedules.build(noise["schedule"])}, "low_res")
        shape = typed(config["shape"], tuple[int, int, int], "low_res.shape")
        return cls(shape, typed(config["factor"], int | None, "low_res.factor"), noise)

    @classmethod
    def fit(cls, settings: Mapping[str, Any], data: DataFacts) -> Self:
        """`settings` has `factor` and `noise`, the highest level as a fraction."""
        shrunk_size(settings["factor"], *data.shape[1:])
        return cls(data.shape, settings["factor"], NoiseAugmentation.up_to(settings["noise"]))

    def _check(self, images: Tensor) -> None:
        """Raises UserError unless the sides of these divide those of the large images."""
        if images.shape[1] != self.shape[0] or any(self.shape[i] % images.shape[i + 1] for i in (1, 2)):
            raise UserError(
                f"this up-sampler makes images of {'×'.join(map(str, self.shape))} from low-resolution ones of "
                f"{self.shape[0]} channels whose sides divide its own, not from "
                f"{'×'.join(map(str, images.shape[1:]))}.",
                key="low_res",
                code="shape",
            )


def shrink(images: Tensor, factor: int) -> Tensor:
    """Images [B, C, H, W] at 1/factor of their size: each pixel is the mean of factor × factor pixels, without
    aliasing.

    Raises:
        UserError: a side that the factor does not divide; the nearest sizes that fit are named.
    """
    shrunk_size(factor, *images.shape[2:])
    return F.avg_pool2d(images, factor)


def shrunk_size(factor: int, height: int, width: int) -> tuple[int, int]:
    """The height and width of an image that is made `factor` times smaller.

    Raises:
        UserError: a side that the factor does not divide; the nearest sizes that fit are named.
    """
    if factor < 1 or height % factor or width % factor:
        below = [max(side // max(factor, 1), 1) * max(factor, 1) for side in (height, width)]
        raise UserError(
            f"images of {height}×{width} cannot be shrunk {factor} times: {below[0]}×{below[1]} can, for example.",
            key="upsampling.factor",
            code="shape",
        )
    return height // factor, width // factor
