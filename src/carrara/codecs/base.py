"""Pixels to what the diffusion model works in, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from carrara.process.noise import Noise


class Posterior(Protocol):
    """What an image may be encoded to: q(z|x)."""

    def mode(self) -> Tensor:
        """The most probable latent, for inversion and evaluation, [B, C', H', W']."""
        ...

    def sample(self, noise: Noise) -> Tensor:
        """A draw of the latent, for training, [B, C', H', W']."""
        ...


class Codec(Protocol):
    """`decode(encode(x).mode())` is the reconstruction. The identity makes pixel diffusion the same program.

    Attributes:
        kind: the word that `config.json` names it by.
        reduction: how many pixels one side of a latent position covers.
        bounded: whether latents lie in [-1, 1] as pixels do, so that clipping a prediction makes sense.
    """

    @property
    def kind(self) -> str: ...

    @property
    def reduction(self) -> int: ...

    @property
    def bounded(self) -> bool: ...

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A latent's shape, [C', H', W'], for an image's, [C, H, W] (without the batch)."""
        ...

    def encode(self, x: Tensor) -> Posterior:
        """Images [B, C, H, W] in [-1, 1] to their latent posterior, scaled to about unit variance."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents to images [B, C, H, W], about [-1, 1]."""
        ...


@dataclass(frozen=True)
class Exact:
    """The posterior of a codec without randomness: one latent."""

    latent: Tensor

    def mode(self) -> Tensor:
        return self.latent

    def sample(self, noise: Noise) -> Tensor:
        return self.latent


@dataclass(frozen=True)
class Identity:
    """Latents are the pixels themselves."""

    kind: str = "identity"
    reduction: int = 1
    bounded: bool = True

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def encode(self, x: Tensor) -> Exact:
        return Exact(x)

    def decode(self, z: Tensor) -> Tensor:
        return z
