"""How close a picture is to the one it should be: PSNR and SSIM, per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.errors import UserError

PEAK = 2.0
"""Images span [-1, 1]."""
HIGHEST_PSNR = 100.0
"""In dB; what equal images have. A mean over a set stays finite, and 8-bit images that differ by one level in one pixel
of 1024² reach 108 dB."""


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10·log₁₀(2² / mean squared error) in dB, one for each image, float64 [N].

    Average these for a set (never the errors). At most `HIGHEST_PSNR`, which equal images have.

    Args:
        images, targets: [N, C, H, W] in [-1, 1].
    """
    _check(images, targets)
    error = (images.double() - targets.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(PEAK**2 / error)).clamp(max=HIGHEST_PSNR)


def ssim(images: Tensor, targets: Tensor, window: int = 11, deviation: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13), one for each image, float64 [N], at most 1.

    Gaussian window of `deviation`, K₁ = 0.01, K₂ = 0.03, over the places where the whole window fits, then the
    mean over places and channels. On images smaller than the window, the largest odd window that fits.

    Args:
        images, targets: [N, C, H, W] in [-1, 1].
    """
    _check(images, targets)
    fits = min(window, *images.shape[-2:])
    fits -= 1 - fits % 2
    at = torch.arange(fits, dtype=torch.float64, device=images.device) - fits // 2
    taps = torch.exp(-0.5 * (at / deviation).square())
    taps = taps / taps.sum()

    def local_mean(x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, 1, *shape[-2:])
        x = F.conv2d(F.conv2d(x, taps[None, None, :, None]), taps[None, None, None, :])
        return x.reshape(*shape[:2], *x.shape[-2:])

    x, y = images.double(), targets.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = local_mean(x.square()) - mean_x.square()
    var_y = local_mean(y.square()) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _check(images: Tensor, targets: Tensor) -> None:
    if images.shape != targets.shape or images.ndim != 4 or len(images) == 0:
        raise UserError(
            f"images of shape {list(images.shape)} and {list(targets.shape)} cannot be compared one to one: "
            "give [N, C, H, W] twice.",
            key="targets",
            code="shape",
        )
