"""How images become a feature network's input: the resize and the scaling, which are part of a metric.

A resize without antialiasing, or with another idea of where a pixel's centre lies, moves a FID by more than
most papers' improvements (Parmar et al. 2022), so each convention is named and travels with the number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.errors import UserError, nearest


def levels(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] as the whole numbers 0..255 that a PNG would hold, float32 RGB.

    Gray images are repeated to three channels.

    Raises:
        UserError: neither 1 nor 3 channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"images of shape {list(images.shape)} do not fit a feature network: give gray or RGB, [N, 1 or 3, H, W].",
            key="channels",
            code="shape",
        )
    whole = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return whole.expand(-1, 3, -1, -1)


def tensorflow_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's `resize_bilinear` (align_corners False) of [N, C, H, W] to `size` squared.

    Output pixel i reads at i·(in/out): corners are aligned at the top left, not centres, and nothing is
    smoothed when shrinking. In float32, width first, as its kernel does.
    """

    def lerp(values: Tensor, dim: int) -> Tensor:
        length = values.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=values.device) * torch.tensor(length / size)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        weight = (at - low).reshape([-1 if d == dim else 1 for d in range(4)])
        first = values.index_select(dim, low)
        return first + (values.index_select(dim, high) - first) * weight

    return images if images.shape[-2:] == (size, size) else lerp(lerp(images, 3), 2)


def _tensorflow(images: Tensor) -> Tensor:
    return (tensorflow_bilinear(levels(images), 299) - 128) / 128


def _pytorch_fid(images: Tensor) -> Tensor:
    resized = F.interpolate(levels(images) / 255, (299, 299), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def _clean_fid(images: Tensor) -> Tensor:
    resized = F.interpolate(levels(images), (299, 299), mode="bicubic", align_corners=False, antialias=True)
    return (resized - 128) / 128


INCEPTION = {"tensorflow": _tensorflow, "pytorch-fid": _pytorch_fid, "clean-fid": _clean_fid}
"""Ways from images in [-1, 1] to the Inception network's [N, 3, 299, 299].

- tensorflow: the original's, ADM's and torch-fidelity's: bilinear as TensorFlow 1, (v - 128)/128.
- pytorch-fid: bilinear between pixel centres, without antialiasing, 2·v/255 - 1.
- clean-fid: Pillow's bicubic with antialiasing, kept in floating point, (v - 128)/128.
"""


def inception_input(images: Tensor, preparation: str) -> Tensor:
    """The Inception network's input for images in [-1, 1], by one of `INCEPTION`."""
    if preparation not in INCEPTION:
        raise UserError(
            f"unknown preparation '{preparation}': {nearest(preparation, INCEPTION)}", key="preparation", code="unknown"
        )
    return INCEPTION[preparation](images)


def standardised(images: Tensor, size: int, mean: list[float], std: list[float]) -> Tensor:
    """Bicubic (antialiased) to a shorter side of `size`, centre crop, (v/255 - mean)/std for each channel.

    The resize works on 8 bits, as Pillow's, which CLIP and DINOv2 were trained behind.
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    resized = levels(images).to(torch.uint8)
    if scale != 1:
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        on_cpu = resized.cpu()  # there is no 8-bit kernel elsewhere
        resized = F.interpolate(on_cpu, shape, mode="bicubic", align_corners=False, antialias=True).to(images.device)
    top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
    crop = resized[..., top : top + size, left : left + size].float() / 255
    return (crop - crop.new_tensor(mean)[:, None, None]) / crop.new_tensor(std)[:, None, None]
