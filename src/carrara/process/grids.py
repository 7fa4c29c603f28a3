"""Grids: the explicit times of a sampling run, the last one included.

No solver infers a neighbour: it gets the pair (t, s). A grid that ends at 0 ends at the clean image; one
that ends at 1 ends at the first level of a table, as Stable Diffusion's `set_alpha_to_one = false` does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from carrara.errors import UserError, whole_number
from carrara.process.schedules import Discrete, Schedule

Terminal = Literal["clean", "last"]


@dataclass(frozen=True)
class Grid:
    """Times from noisy to clean, strictly descending; `reversed()` makes the only ascending form.

    Attributes:
        times: float64 [n + 1] for n pairs.
        name: how the grid was made, for its `repr` and for protocols.
        ascending: True for a grid made by `reversed()`.
    """

    times: Tensor
    name: str = "given"
    ascending: bool = field(default=False)

    def __post_init__(self) -> None:
        times = torch.as_tensor(self.times, dtype=torch.float64).cpu()
        if times.ndim != 1 or len(times) < 2:
            raise UserError("a grid needs at least two times.", key="times")
        if not bool(torch.isfinite(times).all()) or float(times.min()) < 0:
            raise UserError("a grid's times must be finite and not negative.", key="times")
        steps = times.diff() if self.ascending else -times.diff()
        if not bool((steps > 0).all()):
            at = int((steps <= 0).nonzero()[0, 0])
            direction = "ascend" if self.ascending else "descend"
            raise UserError(
                f"a grid's times must strictly {direction}: "
                f"{float(times[at]):g} is followed by {float(times[at + 1]):g}.",
                key="times",
            )
        object.__setattr__(self, "times", times)

    def __len__(self) -> int:
        """The number of pairs, which is the number of steps."""
        return len(self.times) - 1

    def pairs(self) -> list[tuple[float, float]]:
        """The (from, to) times of every step, in walking order."""
        values = self.times.tolist()
        return list(itertools.pairwise(values))

    def reversed(self) -> Grid:
        """The same times in the other order: DDIM on it is DDIM inversion (docs/math.md §10)."""
        return Grid(self.times.flip(0), self.name, not self.ascending)

    def __repr__(self) -> str:
        values = [f"{t:.6g}" for t in self.times.tolist()]
        if len(values) > 7:
            values = [*values[:3], "…", *values[-3:]]
        way = ", reversed" if self.ascending else ""
        return f"Grid({self.name}{way}: {len(self)} steps, {' → '.join(values)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and torch.equal(self.times, other.times)

    def __hash__(self) -> int:
        return hash(tuple(self.times.tolist()))


def _steps(schedule: Schedule, steps: int) -> int:
    steps = whole_number(steps, "steps", least=1)
    if schedule.discrete and steps > schedule.final_time:
        raise UserError(f"steps is {steps}: the schedule has only {schedule.final_time:g}.", key="steps")
    return steps


def _table(schedule: Schedule, spacing: str) -> int:
    if not isinstance(schedule, Discrete):
        raise UserError(
            f"{spacing} spacing counts the entries of a table: use trailing, linspace, karras or log_snr.",
            key="spacing",
            code="unsupported",
        )
    return int(schedule.final_time)


def _finish(times: Iterable[float], name: str, terminal: Terminal = "clean") -> Grid:
    """Descending times closed by the clean point or by t = 1 (which does not occur twice)."""
    values = list(times)
    if terminal == "clean":
        values.append(0.0)
    elif values[-1] != 1:
        values.append(1.0)
    if len(values) < 2:
        raise UserError(
            "a grid of one step that starts at t = 1 can only end at the clean point.", key="terminal", code="conflict"
        )
    return Grid(torch.tensor(values, dtype=torch.float64), name)


def given(schedule: Schedule, times: Sequence[float] | Tensor) -> Grid:
    """Exactly these times, descending, the last one included.

    Raises:
        UserError: they do not descend, lie outside the schedule, or where a table has no level.
    """
    grid = Grid(torch.as_tensor(times, dtype=torch.float64))
    schedule.alpha(grid.times)
    return grid


def leading(schedule: Schedule, steps: int, offset: int = 0, terminal: Terminal = "clean") -> Grid:
    """t = 1 + offset + i·⌊T/steps⌋ for i = steps-1..0: the spacing of DDIM's programs, which never visits T
    (diffusers' "leading"; Stable Diffusion adds `offset` = 1 and ends at `terminal` = "last").

    Raises:
        UserError: the offset leads past T.
    """
    final = _table(schedule, "leading")
    stride = final // _steps(schedule, steps)
    times = [1 + offset + i * stride for i in reversed(range(steps))]
    if times[0] > final or times[-1] < 1:
        raise UserError(
            f"offset {offset} with {steps} steps leads to t = {times[0]}, outside 1..{final}: use offset 0.",
            key="offset",
        )
    return _finish(times, f"leading{f' +{offset}' if offset else ''}", terminal)


def trailing(schedule: Schedule, steps: int, terminal: Terminal = "clean") -> Grid:
    """t = T·(1 - i/steps) for i = 0..steps-1, rounded for a table: starts at T (Lin et al. 2023, table 2).
    On a continuous schedule this is the uniform spacing of [0, final_time]."""
    n, final = _steps(schedule, steps), schedule.final_time
    times = [final * (n - i) / n for i in range(n)]
    if schedule.discrete:
        # Python rounds half to even, as the numpy rounding of the published code does.
        times = [float(round(t)) for t in times]
    return _finish(times, "trailing", terminal)


def linspace(schedule: Schedule, steps: int, terminal: Terminal = "clean") -> Grid:
    """Evenly from `final_time` down to `first_time`, both included, rounded for a table; then the terminal."""
    n = _steps(schedule, steps)
    times = torch.linspace(schedule.final_time, schedule.first_time, n, dtype=torch.float64)
    return _finish((times.round() if schedule.discrete else times).tolist(), "linspace", terminal)


def quadratic(schedule: Schedule, steps: int, terminal: Terminal = "clean") -> Grid:
    """t = 1 + ⌊q²⌋ with q evenly from 0 to √(0.8·T): the spacing of DDIM's CIFAR-10 table (Song et al. 2020,
    appendix D.2). Where squares of small q fall on one level, each takes the next free one; one step alone starts at
    the noisy end."""
    n, final = _steps(schedule, steps), _table(schedule, "quadratic")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.ones(1, dtype=torch.float64)
    # The floor of a square that rounding has put just below a whole number would be one too low.
    squares = (0.8 * final * ramp**2 + 1e-9).long().tolist()
    times: list[int] = []
    for square in squares:
        times.append(max(square + 1, times[-1] + 1 if times else 1))
    return _finish([float(t) for t in reversed(times)], "quadratic", terminal)


def _noise_to_signal(schedule: Schedule, t: float) -> float:
    return math.exp(-float(schedule.log_snr(t)) / 2)


def karras(
    schedule: Schedule,
    steps: int,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Grid:
    """σ_i = (σ_max^{1/ρ} + i/(n-1)·(σ_min^{1/ρ} - σ_max^{1/ρ}))^ρ, then clean (Karras et al. 2022, eq. 5).

    The formula acts on the noise-to-signal ratio s/a. Without `sigma_min` and `sigma_max` the ratios at
    `first_time` and `final_time` are taken.

    Raises:
        UserError: the schedule ends without any signal, so that σ_max would be infinite.
    """
    n = _steps(schedule, steps)
    low = _noise_to_signal(schedule, schedule.first_time) if sigma_min is None else sigma_min
    high = _noise_to_signal(schedule, schedule.final_time) if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise UserError(
            "Karras' grid needs 0 < sigma_min < sigma_max < ∞: name sigma_max where the schedule ends in pure noise.",
            key="sigma_max",
        )
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return _finish(_times(schedule, -2 * sigmas.log(), pinned=sigma_max is None), f"karras ρ={rho:g}")


def log_snr(schedule: Schedule, steps: int, bends: Sequence[float] = ()) -> Grid:
    """Evenly in log-SNR from `final_time` to `first_time`, then clean (Lu et al. 2022, DPM-Solver §3.4).

    A schedule that ends without any signal starts there and spaces the rest from its next level.

    Args:
        bends: the logarithm of the step length, up to a constant, at even places along the grid and linear between
            them; none, or equal ones, for even steps. `carrara.solvers.optimised_grid` finds them.
    """
    n = _steps(schedule, steps)
    low, high = float(schedule.log_snr(schedule.final_time)), float(schedule.log_snr(schedule.first_time))
    name = "log_snr" if len(bends) == 0 else f"log_snr bent {', '.join(f'{b:.3g}' for b in bends)}"
    if math.isinf(low):
        before = schedule.final_time - 1 if schedule.discrete else schedule.final_time * (1 - 1e-3)
        rest = _bent(float(schedule.log_snr(before)), high, n - 1, bends)
        return _finish([schedule.final_time, *_times(schedule, rest, pinned=False)], name)
    return _finish(_times(schedule, _bent(low, high, n, bends), pinned=True), name)


def _bent(low: float, high: float, count: int, bends: Sequence[float]) -> Tensor:
    """`count` values from low to high, both included, whose steps are as exp(bends)."""
    if len(bends) < 2 or count < 3:
        return torch.linspace(low, high, count, dtype=torch.float64)
    places = np.linspace(0, len(bends) - 1, count - 1)
    steps = np.exp(np.interp(places, np.arange(len(bends)), bends))
    share = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    return torch.from_numpy(low + (high - low) * share)


def _times(schedule: Schedule, log_snrs: Tensor, pinned: bool) -> list[float]:
    """The times of some log-SNRs; `pinned` puts the first exactly at `final_time` in spite of rounding."""
    times: list[float] = schedule.time_at(log_snrs).tolist()
    if pinned and times:
        times[0] = schedule.final_time
    return times


def sections(schedule: Schedule, counts: str | Sequence[int]) -> Grid:
    """guided-diffusion's respacing: the table in as many equal sections as there are counts, each covered in
    its own number of steps ("25", "10,15,20"); "ddimN" is `ddim(schedule, N)`.

    As in the original program, the float stride is accumulated and rounded half to even.

    Raises:
        UserError: a section is shorter than its count, or the text is not counts.
    """
    final = _table(schedule, "sections")
    if isinstance(counts, str):
        text = counts
        if text.startswith("ddim") and text[4:].isdigit():
            return ddim(schedule, int(text[4:]))
        try:
            counts = [int(part) for part in text.split(",")]
        except ValueError:
            raise UserError(
                f"'{text}' is not a list of section counts such as '10,15,20' or 'ddim25'.", key="counts"
            ) from None
    size, extra = divmod(final, max(len(counts), 1))
    indices: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (1 if i < extra else 0)
        if not 1 <= count <= length:
            raise UserError(
                f"section {i + 1} holds {length} of the {final} levels: it cannot be covered in {count} steps.",
                key="counts",
            )
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            indices.append(start + round(position))
            position += stride
        start += length
    if not indices:
        raise UserError("sections need at least one count.", key="counts")
    return _finish([float(i + 1) for i in reversed(indices)], f"sections {','.join(map(str, counts))}")


def ddim(schedule: Schedule, steps: int) -> Grid:
    """guided-diffusion's "ddimN": the one whole stride that gives exactly `steps` levels from t = 1 on.

    Raises:
        UserError: no whole stride gives that many levels; the message names the nearest that do.
    """
    final, n = _table(schedule, "ddim"), _steps(schedule, steps)
    # ⌈T/stride⌉ levels for each whole stride below T, as in the original program.
    lengths = {-(-final // stride): stride for stride in range(final - 1, 0, -1)}
    if n not in lengths:
        close = sorted(lengths, key=lambda length: abs(length - n))[:2]
        raise UserError(
            f"no whole stride covers {final} levels in {n} steps: the nearest are {min(close)} and {max(close)}.",
            key="steps",
        )
    return _finish([float(i + 1) for i in reversed(range(0, final, lengths[n]))], f"ddim{n}")
