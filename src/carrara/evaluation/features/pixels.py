"""The pixels themselves as features: exact and weightless; meant for small images such as the 8×8 digits."""

from __future__ import annotations

from torch import Tensor


class Pixels:
    """Images [N, C, H, W] in [-1, 1] -> their values, float32 [N, C·H·W], at their own size."""

    name = "pixels"
    checksum = ""
    preparation = "own size, [-1, 1]"

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)
