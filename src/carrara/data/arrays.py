"""Pictures in memory as one array: .npz files as ADM's evaluator reads and writes them, and the digits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from carrara.data.columns import class_numbers
from carrara.data.source import Source
from carrara.errors import UserError
from carrara.files import read_arrays


class ArrayPictures:
    """uint8 [N, H, W, C], C 1, 3 or 4, handed out as PNG."""

    def __init__(self, array: NDArray[np.uint8], name: str) -> None:
        self._array = array
        self._name = name
        self.encoded_bytes = array.nbytes

    def __len__(self) -> int:
        return len(self._array)

    def name(self, index: int) -> str:
        return f"{self._name}/{index:05d}"

    def read(self, index: int) -> bytes:
        pixels = self._array[index]
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png", compress_level=0)
        return file.getvalue()


def open_npz(path: Path) -> Source:
    """`arr_0` uint8 [N, H, W, C] and, where it is there, `arr_1` labels [N].

    Raises:
        UserError: the file is damaged, or has no images.
    """
    content = read_arrays(path, ("arr_0", "arr_1"))
    array, labels = content.get("arr_0"), content.get("arr_1")
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"{path} has no images: 'arr_0' must be uint8 [N, H, W, C] with C 1, 3 or 4.", key=str(path), code="shape"
        )
    if not len(array):
        raise UserError(f"{path} has 0 images: 'arr_0' is empty.", key=str(path), code="missing")
    if labels is not None and (labels.shape != (len(array),) or labels.dtype.kind not in "iufbU"):
        raise UserError(
            f"the labels 'arr_1' of {path} must be one class for each of the {len(array)} images.",
            key=str(path),
            code="mismatch",
        )
    numbers, names = (None, None) if labels is None else class_numbers(labels.tolist(), where=str(path))
    classes = "" if names is None else f", {len(names)} classes in 'arr_1'"
    return Source(
        str(path),
        f"an npz array of {len(array)} images{classes}",
        ArrayPictures(array, path.name),
        numbers,
        class_names=names,
    )
