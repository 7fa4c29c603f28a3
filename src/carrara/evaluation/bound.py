"""The variational bound of images under a model, all its terms shown (Ho et al. 2020, §3; docs/math.md §4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.modes import eval_mode
from carrara.process import grids
from carrara.process.bound import Chain
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser
from carrara.process.schedules import Schedule
from carrara.process.transitions import ReverseVariance, diffuse

LN2 = math.log(2)


@dataclass(frozen=True)
class Bound:
    """An upper bound of -log p(x), one sample of the noise at every time.

    Attributes:
        times: float64 [n], the times of the chain from noisy to clean.
        prior: [B], L_T, how much of the image is left at the first time.
        terms: [B, n], L_{t-1} of every pair; the last column is the reconstruction L_0.
        x0_errors: [B, n], mean over dimensions of (x_0 - x̂_0)².
        eps_errors: [B, n], mean over dimensions of (ε - ε̂)².
        unit: "bits/dim" for images of discrete levels, "nats/dim" for continuous data, whose bound is that of a
            density and may be negative. Prior and terms are given in it.
    """

    times: Tensor
    prior: Tensor
    terms: Tensor
    x0_errors: Tensor
    eps_errors: Tensor
    unit: str

    @property
    def total(self) -> Tensor:
        """Prior, matching and reconstruction together, [B]."""
        return self.prior + self.terms.sum(1)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a report: means over the images, the total with its standard error."""
        total = self.total.double()
        return {
            "unit": self.unit,
            "images": len(total),
            "steps": len(self.times),
            "total": float(total.mean()),
            "standard_error": float(total.std() / len(total) ** 0.5) if len(total) > 1 else None,
            "prior": float(self.prior.double().mean()),
            "matching": float(self.terms[:, :-1].double().sum(1).mean()),
            "reconstruction": float(self.terms[:, -1].double().mean()),
            "times": self.times.tolist(),
            "terms": self.terms.double().mean(0).tolist(),
            "x0_errors": self.x0_errors.double().mean(0).tolist(),
            "eps_errors": self.eps_errors.double().mean(0).tolist(),
        }


def check_levels(images: Tensor, levels: int) -> None:
    """Raises UserError unless images have `levels` evenly spaced values in [-1, 1], whose bins have a probability."""
    steps = (images.double() + 1) * ((levels - 1) / 2)
    if float(images.abs().max()) > 1 + 1e-5 or float((steps - steps.round()).abs().max()) > 1e-2:
        raise UserError(
            f"these images do not have {levels} evenly spaced values in [-1, 1]: give their own number of levels, "
            "or levels=None for continuous data.",
            key="levels",
            code="mismatch",
        )


def bits_per_dimension(
    model: DiffusionModel | Denoiser,
    images: Tensor,
    grid: Grid | None = None,
    *,
    schedule: Schedule | None = None,
    condition: Condition | None = None,
    levels: int | Literal["model"] | None = "model",
    variance: ReverseVariance | None = None,
    clip: bool | None = None,
    cdf: Literal["erf", "tanh"] = "erf",
    noise: Noise | None = None,
    batch_size: int = 64,
    on_step: Callable[[int, int], None] | None = None,
) -> Bound:
    """The variational bound of every image: prior matching, denoising matching for every t, reconstruction.

    The network predicts once for each image and time of the grid. A short grid is a chain of its own, with a bound
    of its own that is looser.

    Args:
        model: a pixel `DiffusionModel`, or a denoiser.
        images: [B, C, H, W] in [-1, 1].
        grid: the times of the chain; default: every level of the table.
        schedule: of the denoiser; default: its attribute `schedule`.
        condition: what the model is conditioned on, one row or one for each image.
        levels: how many values a pixel has. "model" takes those the model was trained on, 256 for a bare denoiser.
            None is continuous data: nats of a density, not bits.
        variance: of the reverse steps, see `Chain`.
        clip: clamp x̂_0 to [-1, 1]; by default for discrete levels, as guided-diffusion does.
        cdf: "erf", or guided-diffusion's "tanh".
        noise: draw i + 1 noises the images for pair i.
        batch_size: how many images are worked on at once; the result does not depend on it.
        on_step: called after every pair of a batch with how many predictions are done, and of how many.

    Raises:
        UserError: a latent model; images that do not have these levels; a grid that does not end clean.
    """
    denoiser, schedule, known = unpack(model, schedule)
    levels = known if levels == "model" else levels
    if levels is not None:
        check_levels(images, levels)
    chain = Chain(schedule, grid or every_level(schedule), variance, levels, cdf)
    clip = levels is not None if clip is None else clip
    batches = list(Conditioned.of(images, condition, noise).batches(batch_size))
    parts, steps = [], len(chain.grid)
    with evaluating(model):
        for done, batch in enumerate(batches):
            progress = None if on_step is None else _counter(on_step, done * steps, len(batches) * steps)
            parts.append(_terms(chain, denoiser, batch, clip, progress))
    prior, terms, x0_errors, eps_errors = (torch.cat(column) for column in zip(*parts, strict=True))
    scale, unit = (1.0, "nats/dim") if levels is None else (1 / LN2, "bits/dim")
    return Bound(chain.grid.times[:-1], prior * scale, terms * scale, x0_errors, eps_errors, unit)


def every_level(schedule: Schedule) -> Grid:
    """The whole chain of a discrete schedule.

    Raises:
        UserError: a continuous one, which has no levels of its own.
    """
    if not schedule.discrete:
        raise UserError(
            "a continuous schedule has no levels of its own: give the grid whose bound is meant.",
            key="grid",
            code="missing",
        )
    return grids.trailing(schedule, int(schedule.final_time))


@dataclass(frozen=True)
class Conditioned:
    """Images [B, …], each with its condition and with noise of its own."""

    images: Tensor
    condition: Condition
    noise: Noise

    @classmethod
    def of(cls, images: Tensor, condition: Condition | None, noise: Noise | None) -> Conditioned:
        """The condition repeated for each image where it is one for all; default: none, and the rows of seed 0."""
        noise = noise or Noise()
        batched = (condition or Condition()).batch(len(images)).to(images.device)
        return cls(images, batched, noise.rows(range(len(images))) if noise.ids is None else noise)

    def batches(self, size: int) -> Iterator[Conditioned]:
        """The same in batches; every image keeps its noise."""
        assert self.noise.ids is not None
        for low in range(0, len(self.images), size):
            rows = slice(low, low + size)
            yield Conditioned(self.images[rows], self.condition.rows(rows), self.noise.rows(self.noise.ids[rows]))


def unpack(model: DiffusionModel | Denoiser, schedule: Schedule | None) -> tuple[Denoiser, Schedule, int]:
    """The denoiser, its schedule and the number of levels it was trained on.

    Raises:
        UserError: a latent model; a denoiser without a schedule.
    """
    if isinstance(model, DiffusionModel):
        if not model.codec.bounded:
            raise UserError(
                "a latent model has no likelihood of pixels: bits per dimension are for pixel models.",
                key="model",
                code="unsupported",
            )
        return model.denoiser(), model.schedule, model.levels
    own = schedule or getattr(model, "schedule", None)
    if not isinstance(own, Schedule):
        raise UserError("this denoiser has no schedule: give schedule=….", key="schedule", code="missing")
    return model, own, 256


def evaluating(model: DiffusionModel | Denoiser) -> AbstractContextManager[None]:
    """A model's dropout off, and afterwards as it was."""
    return eval_mode(*([model.network] if isinstance(model, DiffusionModel) else []))


def _counter(on_step: Callable[[int, int], None], done: int, total: int) -> Callable[[int], None]:
    return lambda index: on_step(done + index + 1, total)


def _terms(
    chain: Chain,
    denoiser: Denoiser,
    batch: Conditioned,
    clip: bool,
    progress: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prior [B], terms, x_0 errors and ε errors [B, n] of one batch, in nats per dimension, on the CPU."""
    x0, columns = batch.images, []
    with torch.no_grad():
        for index, (t, _) in enumerate(chain.grid.pairs()):
            eps = batch.noise.at(index + 1).like(x0)
            prediction = denoiser(diffuse(chain.schedule, x0, t, eps), t, batch.condition)
            if clip:
                prediction = prediction.with_x0(prediction.x0.clamp(-1, 1))
            errors = [(prediction.x0 - x0).square(), (prediction.eps - eps).square()]
            columns.append(torch.stack([chain.term(prediction, x0, index), *(e.flatten(1).mean(1) for e in errors)]))
            if progress is not None:
                progress(index)
        terms, x0_errors, eps_errors = torch.stack(columns, dim=2).cpu()
        return chain.prior(x0).cpu(), terms, x0_errors, eps_errors
