"""Large images through a codec in overlapping tiles, so that memory does not grow with the image.

The tiles' results are mixed with weights that sum to 1 everywhere, so that no value lies further from the whole
image's than the worst tile's does. A tile is not used near its cut edges, where the codec misses what lies beyond:
between two neighbours with `overlap` pixels in common one changes into the other over the `blend` pixels in the middle.
So the result is the whole image's for a codec that sees no further than (overlap - blend)/2 pixels; where tiles
disagree by d (group norms and attention see a whole tile), two neighbouring pixels differ by at most d/blend more
than within a tile: there is no seam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from carrara.codecs.base import Codec, Exact, Posterior
from carrara.codecs.kl import DiagonalGaussian
from carrara.codecs.quantiser import Codes
from carrara.errors import UserError


@dataclass(frozen=True)
class Tiled:
    """A codec that works in tiles.

    Attributes:
        codec: any codec.
        tile: side of a tile in pixels; images that are no larger go through whole.
        overlap: least number of pixels that neighbouring tiles have in common, at most a third of a tile.
        blend: pixels in the middle of the overlap over which one tile changes into the next; None is half of it.

    Raises:
        UserError: a length that is no multiple of the codec's reduction, or an overlap that is too large.
    """

    codec: Codec
    tile: int = 512
    overlap: int = 64
    blend: int | None = None

    def __post_init__(self) -> None:
        r = self.reduction
        for name, length in (("tile", self.tile), ("overlap", self.overlap)):
            if length < 0 or length % r:
                raise UserError(
                    f"{name} = {length} pixels: take a multiple of {r}, such as {max(round(length / r), 1) * r}.",
                    key=name,
                )
        if self.tile < 1:
            raise UserError(f"tile = {self.tile} pixels: take at least {r}.", key="tile")
        if 3 * self.overlap > self.tile:  # so that no more than two tiles are mixed along a side
            raise UserError(
                f"overlap = {self.overlap} is more than a third of a tile of {self.tile} pixels: shrink it.",
                key="overlap",
            )
        if not 0 <= self.blended <= self.overlap:
            raise UserError(
                f"blend = {self.blend} must lie between 0 and the overlap of {self.overlap} pixels.", key="blend"
            )

    @property
    def blended(self) -> int:
        """Pixels over which neighbours are mixed."""
        return self.overlap // 2 if self.blend is None else self.blend

    @property
    def kind(self) -> str:
        """The codec's own."""
        return self.codec.kind

    @property
    def reduction(self) -> int:
        """The codec's own."""
        return self.codec.reduction

    @property
    def bounded(self) -> bool:
        """The codec's own."""
        return self.codec.bounded

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The latent's [C', H', W'] for an image's [C, H, W]."""
        return self.codec.latent_shape(shape)

    def encode(self, x: Tensor) -> Posterior:
        """Images [B, C, H, W] in [-1, 1] to their latent posterior. Of Gaussians mean and log-variance are mixed; of
        codes the latents before they are quantised, which `decode` does.

        Raises:
            UserError: no images [B, C, H, W], a side that the reduction does not divide, or a posterior that cannot be
                mixed.
        """
        if x.ndim != 4:
            raise UserError(
                f"a codec in tiles encodes images [B, C, H, W], not {list(x.shape)}.", key="x", code="shape"
            )
        _, height, width = self.latent_shape(x.shape[1:])
        r = self.reduction
        kinds: set[type[Posterior]] = set()

        def one(top: int, left: int, rows: int, columns: int) -> Tensor:
            posterior = self.codec.encode(x[..., r * top : r * (top + rows), r * left : r * (left + columns)])
            kinds.add(type(posterior))
            return _tensor(posterior)

        mixed = self._mixed(one, height, width, 1)
        return DiagonalGaussian(*mixed.chunk(2, dim=1)) if kinds == {DiagonalGaussian} else Exact(mixed)

    def decode(self, z: Tensor | Codes) -> Tensor:
        """Scaled latents [B, C', h, w], or the codes of a codec that decodes codes, to images [B, C, H, W], about
        [-1, 1].

        Raises:
            UserError: no latents [B, C', h, w].
        """
        latent = z.latent if isinstance(z, Codes) else z
        if latent.ndim != 4:
            raise UserError(
                f"a codec in tiles decodes latents [B, C', h, w], not {list(latent.shape)}.", key="z", code="shape"
            )
        decode: Callable[[Tensor | Codes], Tensor] = self.codec.decode  # type: ignore[assignment]

        def one(top: int, left: int, rows: int, columns: int) -> Tensor:
            def cut(whole: Tensor) -> Tensor:
                return whole[..., top : top + rows, left : left + columns]

            return decode(Codes(cut(z.indices), cut(z.vectors), cut(z.latent)) if isinstance(z, Codes) else cut(z))

        return self._mixed(one, latent.shape[2], latent.shape[3], self.reduction)

    def _mixed(self, one: Callable[[int, int, int, int], Tensor], height: int, width: int, scale: int) -> Tensor:
        """The tiles `one(top, left, rows, columns)` of an area in latent positions, mixed at `scale` times its size."""
        r = self.reduction
        rows = spans(height, self.tile // r, self.overlap // r)
        columns = spans(width, self.tile // r, self.overlap // r)
        ramp = self.blended * scale / r
        across = weights(columns, width, scale, ramp)
        result: Tensor | None = None
        for (top, bottom), down in zip(rows, weights(rows, height, scale, ramp), strict=True):
            for (left, right), over in zip(columns, across, strict=True):
                part = one(top, left, bottom - top, right - left)
                if result is None:
                    result = part.new_zeros(*part.shape[:2], height * scale, width * scale)
                own_down, own_over = down[top * scale : bottom * scale], over[left * scale : right * scale]
                weight = (own_down[:, None] * own_over[None]).to(part)
                result[..., top * scale : bottom * scale, left * scale : right * scale].addcmul_(part, weight)
        assert result is not None  # there is always a first tile
        return result


def whole(codec: Codec) -> Codec:
    """The codec that works in tiles, or the codec itself: what has the weights."""
    return whole(codec.codec) if isinstance(codec, Tiled) else codec


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Evenly spaced [start, end) of as few tiles as cover `length`, neighbours overlapping by at least `overlap`."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [i * (length - tile) // (count - 1) for i in range(count)]
    return [(start, start + tile) for start in starts]


def weights(tiles: list[tuple[int, int]], length: int, scale: int, ramp: float) -> list[Tensor]:
    """The weight of each tile at each of `length`·`scale` positions: float32, 0 outside of the tile, in sum 1.

    Tile i takes over from i - 1 by a linear ramp, `ramp` positions long, around the middle of their overlap.
    """
    positions = torch.arange(length * scale, dtype=torch.float64) + 0.5
    rising = [torch.ones_like(positions)]
    for (_, end), (start, _) in pairwise(tiles):
        middle = scale * (start + end) / 2
        rising.append(((positions - middle) / max(ramp, 1e-9) + 0.5).clamp(0, 1))
    rising.append(torch.zeros_like(positions))
    return [(own - following).float() for own, following in pairwise(rising)]


def _tensor(posterior: Posterior) -> Tensor:
    """The part of a posterior that is mixed, [B, C'', h, w].

    Raises:
        UserError: there is no way to mix posteriors of this kind.
    """
    if isinstance(posterior, DiagonalGaussian):
        return torch.cat([posterior.mean, posterior.log_variance], dim=1)
    if isinstance(posterior, Codes | Exact):
        return posterior.latent
    raise UserError(
        f"a codec whose posterior is of the type {type(posterior).__name__} cannot encode in tiles.",
        key="codec",
        code="unsupported",
    )
