"""What the dataclasses that describe networks have in common: conversion from plain data, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from carrara.entries import typed_fields
from carrara.errors import Code, UserError, nearest


class Params:
    """The base of dataclasses of plain data: `dataclasses.asdict` gives what JSON can hold, lists become tuples.

    Attributes:
        section: the recipe's section that the fields belong to, for messages: "network", "codec", …
    """

    section: ClassVar[str] = "network"

    def __post_init__(self) -> None:
        for name, value in typed_fields(self, self.section).items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        """Raises UserError unless the params describe a network."""

    def _require(self, holds: object, name: str, sentence: str, code: Code = "invalid") -> None:
        """Raises UserError "SECTION.NAME SENTENCE" unless the condition holds."""
        if not holds:
            raise UserError(f"{self.section}.{name} {sentence}", key=f"{self.section}.{name}", code=code)

    def _at_least(self, least: float, *names: str) -> None:
        """Raises UserError unless these fields are None or not below `least`."""
        for name in names:
            value = getattr(self, name)
            self._require(value is None or value >= least, name, f"is {value}: it must be at least {least}.")

    def _fraction(self, *names: str) -> None:
        """Raises UserError unless these fields are None or lie in [0, 1)."""
        for name in names:
            value = getattr(self, name)
            self._require(value is None or 0 <= value < 1, name, f"is {value}: it must be at least 0 and below 1.")

    def _needs(self, name: str, *others: str) -> None:
        """Raises UserError where the field `name` is set and one of the others is not."""
        for other in others:
            if getattr(self, name) and not getattr(self, other):
                key = f"{self.section}.{other}"
                raise UserError(f"{self.section}.{name} needs {key}.", key=key, code="missing")

    def _one_of(self, name: str, choices: Sequence[str]) -> None:
        """Raises UserError unless the field is one of the known words; the nearest is named."""
        value = getattr(self, name)
        self._require(value in choices, name, f"is '{value}': {nearest(str(value), choices)}", "unknown")


@dataclass(frozen=True, kw_only=True)
class LevelParams(Params):
    """What convolutional networks of several resolutions are made of.

    Attributes:
        channels: width of the first level, before `channel_mult`.
        channel_mult: width of each level, in units of `channels`; all levels but the last end with a halving.
        attention: downsampling factors of the levels whose every block is followed by self-attention: (2, 4) are the
            16×16 and 8×8 maps of a 32×32 image.
        dropout: probability, in each residual block.
        norm_groups: groups of every group norm, or the largest divisor of the channels below that.
        checkpointing: compute each block again in the backward pass instead of storing it.
    """

    channels: int = 64
    channel_mult: tuple[float, ...] = (1, 2, 2)
    attention: tuple[int, ...] = (2, 4)
    dropout: float = 0.0
    norm_groups: int = 32
    checkpointing: bool = False

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "channels", "norm_groups")
        widths = self.channel_mult and min(self.widths) >= 1
        self._require(widths, "channel_mult", f"{list(self.channel_mult)} must give each level at least one channel.")
        self._fraction("dropout")
        self._factors_of_levels("attention")

    def _factors_of_levels(self, name: str) -> None:
        """Raises UserError unless the field holds downsampling factors of levels only."""
        unknown = sorted(set(getattr(self, name)) - set(self.factors))
        self._require(not unknown, name, f"holds {unknown}: the levels' downsampling factors are {list(self.factors)}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level; 120/88 times 88 are 120."""
        return tuple(int(mult * self.channels + 1e-6) for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """Downsampling factor of each level."""
        return tuple(2**level for level in range(len(self.channel_mult)))


def times(size: Sequence[int]) -> str:
    """(32, 48) as "32×48"."""
    return "×".join(map(str, size))


def check_multiples(size: Sequence[int], factor: int, what: str, key: str) -> None:
    """Raises UserError unless each side is a positive multiple of a factor; the nearest sizes are named.

    Args:
        size: the sides, in pixels.
        factor: what each must be a multiple of.
        what: what needs it, for the message: "a codec of reduction 8".
        key: of the error.
    """
    if all(side > 0 and side % factor == 0 for side in size):
        return
    below, above = (times([max(1, (side + up) // factor) * factor for side in size]) for up in (0, factor - 1))
    raise UserError(
        f"the size {times(size)} does not fit {what}: each side must be a multiple of {factor}, the nearest are "
        f"{below} and {above}.",
        key=key,
        code="shape",
    )
