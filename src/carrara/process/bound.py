"""The variational bound of a reverse chain, term by term (Ho et al. 2020, eq. 5; docs/math.md §4).

-ln p(x_0) ≤ L_T + Σ L_{t-1} + L_0: prior matching, denoising matching, reconstruction. A chain is a schedule and the
grid: each pair's variance, and that of the last pair above all, depends on the whole grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from carrara.errors import UserError, nearest
from carrara.process.grids import Grid
from carrara.process.prediction import Prediction, Scale
from carrara.process.schedules import Schedule, level
from carrara.process.transitions import (
    Gaussian,
    ReverseVariance,
    Transition,
    chosen_variance,
    learned_log_variance,
    marginal,
)


@dataclass(frozen=True)
class Chain:
    """p(x_T) Π p_θ(x_s|x_t) over the pairs of a grid, p_θ(x_s|x_t) = N(μ(x_t, x̂_0), Σ).

    Pairs are counted in sampling order: index 0 starts at the grid's noisiest time, the last one ends at the
    clean point and is the reconstruction.

    Attributes:
        schedule: the noise levels.
        grid: the times; it must end at the clean point.
        variance: Σ, see `ReverseVariance`; None takes "learned" where the model predicts it, else "small". On the
            last pair, where σ²_post = 0, "small" and "large" are σ²_post
            of the pair before, as in guided-diffusion.
        levels: how many evenly spaced values in [-1, 1] a pixel has, for the reconstruction's probability; None
            for continuous data, whose reconstruction is a density with σ²_{t|0} ("small" and "large").
        cdf: see `Gaussian.bin_log_prob`.

    Raises:
        UserError: the grid ascends or does not end at the clean point; an unknown variance.
    """

    schedule: Schedule
    grid: Grid
    variance: ReverseVariance | None = None
    levels: int | None = 256
    cdf: Literal["erf", "tanh"] = "erf"

    def __post_init__(self) -> None:
        self.schedule.check(self.grid.times)
        if self.grid.ascending or float(self.grid.times[-1]) != 0:
            raise UserError(
                "the bound needs a grid that descends to the clean point, t = 0.", key="grid", code="unsupported"
            )
        if self.variance is not None and self.variance not in get_args(ReverseVariance):
            raise UserError(
                f"there is no variance '{self.variance}': {nearest(self.variance, get_args(ReverseVariance))}",
                key="variance",
                code="unknown",
            )

    def __len__(self) -> int:
        return len(self.grid)

    def index(self, times: Tensor) -> Tensor:
        """The pairs that start at `times` [B], int64 [B].

        Raises:
            UserError: a time that starts no pair.
        """
        starts = self.grid.times[:-1].flip(0)
        place = torch.searchsorted(starts, times.cpu().double()).clamp(max=len(starts) - 1)
        if not torch.equal(starts[place], times.cpu().double()):
            raise UserError(
                "a time is none of the grid's, of whose pairs the bound consists: it does not visit it.",
                key="times",
                code="mismatch",
            )
        return len(starts) - 1 - place

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """The coefficients of every pair, float64 [n]."""
        times = self.grid.times.tolist()
        before = [None, *times[:-2]]
        steps = [
            Transition.of(self.schedule, *pair, last) for pair, last in zip(self.grid.pairs(), before, strict=True)
        ]
        floor = [transition.floor_variance() for transition in steps]
        large = [transition.variance for transition in steps]
        end = large[-1] if self.levels is None else floor[-1]
        columns = {
            "x": [transition.x_coefficient for transition in steps],
            "x0": [transition.x0_coefficient for transition in steps],
            "posterior": [transition.posterior_variance for transition in steps],
            "small": [*floor[:-1], end],
            "large": [*large[:-1], end],
            "floor": floor,
            "ceiling": large,
        }
        return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}

    def _read(self, name: str, index: int | Tensor, x: Tensor, log: bool = False) -> Scale:
        """A coefficient of one pair as a float, of several as [B, 1, …] in x's type."""
        table = self._tables[name].log() if log else self._tables[name]
        if isinstance(index, int):
            return float(table[index])
        return table[index.cpu()].to(x).reshape(-1, *[1] * (x.ndim - 1))

    def posterior(self, x: Tensor, x0: Tensor, index: int | Tensor) -> Gaussian:
        """q(x_s|x_t, x_0), for one pair or one pair a sample."""
        return Gaussian(self._mean(x, x0, index), self._read("posterior", index, x, log=True))

    def _mean(self, x: Tensor, x0: Tensor, index: int | Tensor) -> Tensor:
        """μ(x_t, x_0), the mean of q(x_s|x_t, x_0) (Ho et al. 2020, eq. 7)."""
        return self._read("x", index, x) * x + self._read("x0", index, x) * x0

    def reverse(self, prediction: Prediction, index: int | Tensor) -> Gaussian:
        """p_θ(x_s|x_t), for one pair or one pair a sample.

        Raises:
            UserError: a variance that the model does not give.
        """
        x, raw = prediction.x, prediction.variance_fraction
        mean = self._mean(x, prediction.x0, index)
        kind = chosen_variance(self.variance, prediction)
        if kind == "optimal":
            assert prediction.x0_variance is not None
            mode = self._read("x0", index, x) ** 2 * prediction.x0_variance
            # On the last pair a mode of no width would leave no variance: far below any bin is enough.
            return Gaussian(mean, (self._read("posterior", index, x) + mode).clamp(min=1e-12).log())
        if kind == "learned":
            assert raw is not None
            ends = self._read("floor", index, x), self._read("ceiling", index, x)
            return Gaussian(mean, learned_log_variance(raw, *ends))
        return Gaussian(mean, self._read(kind, index, x, log=True))

    def prior(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T|x_0) ‖ p(x_T)) in nats per dimension, [B].

        p(x_T) is N(0, I) where the variance is preserved, else N(0, s_T² I): what a sampler starts from.
        """
        alpha, sigma = level(self.schedule, float(self.grid.times[0]))
        preserved = abs(alpha**2 + sigma**2 - 1) < 1e-9
        prior = Gaussian(torch.zeros_like(x0), 0.0 if preserved else 2 * math.log(sigma))
        return _per_dimension(marginal(self.schedule, x0, float(self.grid.times[0])).kl(prior))

    def term(self, prediction: Prediction, x0: Tensor, index: int | Tensor) -> Tensor:
        """What one pair adds to the bound: L_{t-1}, or L_0 for the last pair; nats per dimension, [B].

        Args:
            prediction: what is known at x_t = a_t x_0 + s_t ε.
            x0: the clean images, [B, …].
            index: one pair for the batch, or int64 [B].
        """
        q, p = self.posterior(prediction.x, x0, index), self.reverse(prediction, index)
        if isinstance(index, int):
            return self._reconstruction(p, x0) if index == len(self) - 1 else _per_dimension(q.kl(p))
        # The rows are parted first: the last pair has no posterior variance to form a KL with.
        last = index.cpu() == len(self) - 1
        value = x0.new_zeros(len(x0))
        for chosen, reconstructs in (~last, False), (last, True):
            rows = chosen.nonzero()[:, 0].to(x0.device)
            if len(rows):
                some = p.rows(rows)
                part = self._reconstruction(some, x0[rows]) if reconstructs else _per_dimension(q.rows(rows).kl(some))
                value = value.index_put((rows,), part)
        return value

    def _reconstruction(self, decoder: Gaussian, x0: Tensor) -> Tensor:
        """-ln p_θ(x_0|x_1)."""
        known = decoder.log_prob(x0) if self.levels is None else decoder.bin_log_prob(x0, self.levels, self.cdf)
        return -_per_dimension(known)


def _per_dimension(value: Tensor) -> Tensor:
    return value.flatten(1).mean(1)
