"""Data sets of every layout, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Contents = dict[str, bytes | str]


def pixels(number: int, height: int = 12, width: int = 12) -> NDArray[np.uint8]:
    """A picture by its number: noise of its own seed, uint8 [height, width, 3]."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(number: int, height: int = 12, width: int = 12) -> Image.Image:
    return Image.fromarray(pixels(number, height, width))


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(number: int, height: int = 12, width: int = 12) -> bytes:
    return encoded(picture(number, height, width))


def files(count: int, name: str = "{:03d}.png") -> Contents:
    return {name.format(i): png(i) for i in range(count)}


def folder(root: Path, contents: Mapping[str, bytes | str]) -> Path:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def jsonl(*rows: Mapping[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zipped(path: Path, contents: Mapping[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, contents: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
