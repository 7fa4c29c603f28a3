"""Pictures at the program's edge: tensors in [-1, 1] to 8 bits, PNG files with their metadata, npz, grids."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor

from carrara.errors import UserError


def to_uint8(images: Tensor) -> Tensor:
    """float [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C] in 0..255, rounded and clamped.

    `(x + 1)·127.5`; truncating instead would darken every picture by half a level.
    """
    scaled = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, C] in 0..255 to float32 [N, C, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_pil(image: Tensor) -> Image.Image:
    """float [C, H, W] in [-1, 1] with 1, 3 or 4 channels to a Pillow image.

    Raises:
        UserError: another number of channels, which no picture format shows.
    """
    pixels = to_uint8(image[None])[0].numpy()
    if pixels.shape[2] not in (1, 3, 4):
        raise UserError(
            f"an image of {pixels.shape[2]} channels cannot be shown: 1, 3 and 4 can.", key="image", code="shape"
        )
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Tensor, columns: int | None = None, gap: int = 1) -> Tensor:
    """Lay [N, C, H, W] out row by row as one image [C, H', W'], `gap` pixels of white between them."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def save_png(image: Tensor, path: Path, metadata: Mapping[str, Any] | None = None, scale: int = 1) -> None:
    """Write float [C, H, W] in [-1, 1] as PNG; `metadata` goes into its text chunk "carrara" as JSON.

    Args:
        scale: each pixel becomes a square of this side, for pictures too small to look at.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    picture = to_pil(image)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        chunks.add_text("carrara", json.dumps(dict(metadata), sort_keys=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG", pnginfo=chunks)
    except OSError as error:
        raise UserError(
            f"the picture {path} could not be written ({error.strerror or error}): make room.",
            key=str(path),
            code="resources",
        ) from None


def save_npz(path: Path, images: Tensor, labels: Sequence[int] | Tensor | None = None) -> None:
    """Write `arr_0` uint8 [N, H, W, C] and, where given, `arr_1` int64 [N]: what ADM's evaluator reads.

    The archive holds no clock time, so equal samples give equal files.
    """
    import io
    import zipfile

    arrays: dict[str, NDArray[Any]] = {"arr_0": to_uint8(images).numpy()}
    if labels is not None:
        arrays["arr_1"] = np.asarray(labels, dtype=np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue())
