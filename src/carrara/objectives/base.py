"""What an objective is: losses by named players."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from carrara.condition import Condition
from carrara.process.noise import Noise


@dataclass(frozen=True)
class Examples:
    """The batch that an objective is computed on.

    Attributes:
        x0: clean images in [-1, 1], or scaled latents, [B, C, H, W].
        condition: of each sample, before any dropout.
    """

    x0: Tensor
    condition: Condition = field(default_factory=Condition)


@dataclass(frozen=True)
class Terms:
    """The loss of one player on one batch.

    Attributes:
        per_sample: [B], differentiable; the loss is its mean.
        scalars: further values to log, detached, each [B] or a single number.
        quarter: int64 [B], which quarter of the noise levels every sample fell into (0 the cleanest); None where
            there are no levels.
        times: float64 [B], the level of every sample in schedule time, or None.
    """

    per_sample: Tensor
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    quarter: Tensor | None = None
    times: Tensor | None = None


class Objective(Protocol):
    """An objective with named players: a GAN has two, a diffusion model one. Each player has its own optimiser;
    they step in the declared order on the same batch, the others frozen."""

    @property
    def players(self) -> dict[str, nn.Module]:
        """The modules that learn, by name, in stepping order."""
        ...

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        """The loss of `player` on a batch.

        Args:
            batch: the samples.
            draw: randomness whose rows are the samples' global positions in the run, so that neither the number
                of processes nor an interruption changes it.
            player: one of `players`.
        """
        ...

    def end_step(self) -> None:
        """Learn from the losses of a whole step, after all its micro-batches. Every process must call it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The objective's state between steps (a loss history), for the checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...
