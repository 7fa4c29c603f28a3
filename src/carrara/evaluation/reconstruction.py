"""Every measure of how close pictures are to those that they should be."""

from __future__ import annotations

import torch
from torch import Tensor

from carrara.codecs.perceptual import Perceptual
from carrara.similarity import psnr, ssim


def likeness(images: Tensor, targets: Tensor, perceptual: Perceptual | None = None) -> dict[str, Tensor]:
    """Every measure of how close images [N, C, H, W] in [-1, 1] are to their targets, float64 [N] each.

    Args:
        perceptual: a learned distance (`carrara.codecs.perceptual.LPIPS.load(FILE)`), where its weights are at hand.
    """
    values = {"psnr": psnr(images, targets), "ssim": ssim(images, targets)}
    if perceptual is not None:
        with torch.no_grad():
            values["lpips"] = perceptual(images, targets).double().cpu()
    return values
