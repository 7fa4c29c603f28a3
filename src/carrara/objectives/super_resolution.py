"""Super-resolution by diffusion: (small, large) pairs, the small image beside the noisy large one.

The network sees x_t and, up-sampled to its size and joined along the channels, the small image (Saharia et al. 2021;
Ho et al. 2021, "Cascaded Diffusion Models", §4; `UNetParams.concat_channels`, `upsample_concat`). So that it does not
trust every pixel of an image that another model made, the small image gets noise of a random level in training, and
the network is told that level (conditioning augmentation, there §4.2). The same objective learns a decoder without an
autoencoder (MATH §8): large images from small ones, or latents of the large from the small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError, nearest
from carrara.objectives.base import Examples, Terms
from carrara.objectives.diffusion import DROPOUT, DiffusionObjective
from carrara.objectives.times import draw_uniform
from carrara.process import schedules
from carrara.process.noise import Noise
from carrara.process.schedules import Discrete, Schedule, Time
from carrara.process.transitions import diffuse

Told = Literal["vector", "label"]

LEVEL, SMALL = DROPOUT + 1, DROPOUT + 2
"""The draws of a training step beside the diffusion objective's: the level, and the small image's noise."""


@dataclass(frozen=True)
class NoiseAugmentation:
    """Noise on the small image, and how the network is told how much.

    Attributes:
        schedule: the noise levels of the small image.
        highest: the largest level in schedule time; 0 adds no noise and tells that.
        told: "vector": the level as a share of the schedule's final time, in one channel of `Condition.vector`
            (`UNetParams.vector_channels=1`); "label": the whole level, counted from 0 for time 1, as
            `Condition.label` (Stable Diffusion's up-sampler: 1000 labels, highest 350).

    Raises:
        UserError: a level outside of the schedule, or labels for one without whole levels.
    """

    schedule: Schedule
    highest: float
    told: Told = "vector"

    def __post_init__(self) -> None:
        if self.told not in get_args(Told):
            raise UserError(f"a level cannot be told by '{self.told}': {nearest(self.told, get_args(Told))}")
        least = 1.0 if self.told == "label" else 0.0
        if not least <= self.highest <= self.schedule.final_time:
            raise UserError(
                f"the highest level lies in {least:g}..{self.schedule.final_time:g}, {self.highest:g} does not."
            )
        if self.told == "label" and not isinstance(self.schedule, Discrete):
            raise UserError("levels are told by labels on a discrete schedule only: use told='vector'.")

    @classmethod
    def up_to(cls, share: float) -> NoiseAugmentation:
        """Levels up to a share of the cosine schedule, told as such a share: whatever schedule the large image has,
        the noise is a·small + s·ε with a = cos(share·π/2) (but for the schedule's offset) and a² + s² = 1.

        Raises:
            UserError: a share outside 0..1.
        """
        schedule = schedules.cosine(1000)
        return cls(schedule, share * schedule.final_time)

    @property
    def share(self) -> float:
        """The highest level as a share of the schedule's final time."""
        return self.highest / self.schedule.final_time

    def levels(self, uniform: Tensor) -> Tensor:
        """Levels of uniform numbers in (0, 1): schedule times [B] up to the highest, the lowest of them no noise; of
        labels whole times from 1."""
        if self.told == "label":
            return 1 + (uniform * int(self.highest)).floor()
        return self._audible(uniform * self.highest)

    def level(self, share: float) -> Tensor:
        """The level of a share of the schedule's final time, for sampling: a schedule time [1], as `levels` gives them.

        Raises:
            UserError: more noise than training had, or less than none.
        """
        if not 0 <= share <= self.share:
            raise UserError(
                f"the noise on the small images was up to {self.share:g} in training, {share:g} was never learned from."
            )
        times = torch.tensor([share * self.schedule.final_time], dtype=torch.float64)
        return times.round().clamp(min=1) if self.told == "label" else self._audible(times)

    def _audible(self, times: Tensor) -> Tensor:
        """No noise below the schedule's first level."""
        return torch.where(times < self.schedule.first_time, 0.0, times)

    def condition(
        self, small: Tensor, level: Time, noise: Tensor | Noise, condition: Condition | None = None
    ) -> Condition:
        """What the network is told of small images.

        Args:
            small: [B, C, h, w] in [-1, 1].
            level: schedule time of the noise, one or [B]; 0 adds none.
            noise: standard normal of small's shape, or the samples' noise by address.
            condition: what it is told besides.

        Raises:
            UserError: `condition` already fills the slot that tells the level, or the level is not among those told.
        """
        condition = condition or Condition()
        if getattr(condition, self.told) is not None:
            raise UserError(
                f"the condition's {self.told} is filled, but tells the level of noise here: leave it empty."
            )
        times = torch.as_tensor(level, dtype=torch.float64).reshape(-1).expand(len(small))
        eps = noise.like(small, sub=SMALL) if isinstance(noise, Noise) else noise
        told = replace(condition, concat=diffuse(self.schedule, small, times, eps))
        level_told = self._telling(times, small)
        return replace(told, vector=level_told) if self.told == "vector" else replace(told, label=level_told)

    def _telling(self, times: Tensor, small: Tensor) -> Tensor:
        if self.told == "vector":
            return (times / self.schedule.final_time).to(small)[:, None]
        if bool((times < 1).any()) or bool((times != times.round()).any()):
            raise UserError("a level told by a label is a whole time from 1 on.")
        return (times - 1).long().to(small.device)


class SuperResolutionObjective(DiffusionObjective):
    """The diffusion objective on pairs: `Examples.x0` the large image, `Condition.concat` the small one, clean.

    Args:
        network: takes `Condition.concat`, and the level of its noise as the augmentation tells it.
        schedule: the noise levels of the large image.
        augmentation: the noise of the small one.
        settings: those of `DiffusionObjective`. The null condition of a dropped sample names what is dropped; the
            small image and its level never are.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, augmentation: NoiseAugmentation, **settings: Any
    ) -> None:
        super().__init__(network, schedule, **settings)
        self.augmentation = augmentation

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        """See `Objective.terms`.

        Raises:
            UserError: samples without a small image.
        """
        small = batch.condition.concat
        if small is None:
            raise UserError("super-resolution learns from pairs: give the small images as the condition's concat.")
        level = self.augmentation.levels(draw_uniform(draw, len(small), LEVEL))
        told = self.augmentation.condition(small, level, draw, replace(batch.condition, concat=None))
        return super().terms(Examples(batch.x0, told), draw, player)

    def _condition(self, condition: Condition, draw: Noise, size: int) -> Condition:
        if self.null is None or self.dropout == 0:
            return condition
        kept = {name: getattr(condition, name) for name in ("concat", self.augmentation.told)}
        keep = draw_uniform(draw, size, DROPOUT) >= self.dropout
        return condition.mix(keep, replace(self.null.batch(size), **kept))


@dataclass(frozen=True)
class Upsampling:
    """What an up-sampler was trained for.

    Attributes:
        factor: how many times smaller each side of the small image is than the large image's.
        augmentation: the noise that the small images had.
    """

    factor: int
    augmentation: NoiseAugmentation

    def config(self) -> dict[str, Any]:
        """Plain data that `of` makes it of again."""
        noise = self.augmentation
        told = {"schedule": noise.schedule.spec, "highest": noise.highest, "told": noise.told}
        return {"factor": self.factor, "noise": told}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Upsampling:
        """From what `config` gave."""
        noise = config["noise"]
        schedule = schedules.build(noise["schedule"])
        return cls(config["factor"], NoiseAugmentation(schedule, noise["highest"], noise["told"]))


def pairs(images: Tensor, factor: int, condition: Condition | None = None) -> Examples:
    """Large images and what is left of them at 1/factor of their size, as examples for super-resolution.

    Args:
        images: [B, C, H, W] in [-1, 1].
        factor: each pixel of the small image is the mean of factor × factor pixels, so that nothing folds over.
        condition: what the network is told besides.

    Raises:
        UserError: a side that the factor does not divide; the nearest sizes that fit are named.
    """
    shrunk_size(factor, *images.shape[2:])
    return Examples(images, replace(condition or Condition(), concat=F.avg_pool2d(images, factor)))


def shrunk_size(factor: int, height: int, width: int) -> tuple[int, int]:
    """The height and width of an image that is made `factor` times smaller.

    Raises:
        UserError: a side that the factor does not divide; the nearest sizes that fit are named.
    """
    if factor < 1 or height % factor or width % factor:
        below = [max(side // max(factor, 1), 1) * max(factor, 1) for side in (height, width)]
        raise UserError(f"images of {height}×{width} cannot be shrunk {factor} times: {below[0]}×{below[1]} can, say.")
    return height // factor, width // factor
