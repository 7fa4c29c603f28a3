"""What a set of encoded pictures is, before any is decoded: what reading converts, and a hash of the bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from carrara.data import Source
from carrara.data.batches import in_threads
from carrara.data.decode import IMAGE_SUFFIXES, UnreadablePicture, conversions, decode
from carrara.errors import UserError

SHEET = "grid.png"
"""The contact sheet of `carrara sample`."""
ARCHIVE = "samples.npz"
"""Its archive of all samples."""
FIRST = 3  # names in a notice


@dataclass(frozen=True)
class Survey:
    """Encoded pictures, by their headers and bytes.

    Attributes:
        names: of all of them, in order.
        order: their rows in the data set.
        digest: hash of their bytes, in order, 32 hexadecimal digits.
        conversions: by what reading them converts, the names of the pictures.
        lossy: the names of those that were compressed with loss (JPEG and others).
    """

    names: list[str]
    order: list[int]
    digest: str
    conversions: dict[str, list[str]]
    lossy: list[str]

    def notices(self, name: str) -> list[str]:
        """Sentences on what is converted, how many and which, for a user who did not know."""
        count = len(self.names)
        lines = [
            f"{name}: {len(names):,} of {count:,} pictures are converted, {what} ({_few(names)})."
            for what, names in sorted(self.conversions.items())
        ]
        if 0 < len(self.lossy) < count:
            lines.append(
                f"{name}: {len(self.lossy):,} of {count:,} pictures were compressed with loss ({_few(self.lossy)}), "
                "the others not: metrics count what JPEG leaves out as a difference."
            )
        if twice := _in_two_formats(self.names):
            lines.append(
                f"{name}: {len(twice):,} pictures are there in two formats ({_few(twice)}): each counts as two."
            )
        return lines

    def against(self, name: str, other: Survey, other_name: str) -> list[str]:
        """Whether only one of two sets was compressed with loss, in words."""
        for here, there, names in ((self, other, (name, other_name)), (other, self, (other_name, name))):
            if len(here.lossy) == len(here.names) and not there.lossy:
                return [f"{names[0]} was compressed with loss and {names[1]} was not: metrics count that, too."]
        return []


def survey(source: Source, order: Sequence[int], channels: int = 4) -> Survey:
    """Read the pictures of these rows once, without decoding them.

    Args:
        channels: 4 where transparency is kept.

    Raises:
        UserError: what holds them is gone; a picture that cannot be read is left to whoever decodes it.
    """

    def look(index: int) -> tuple[bytes, tuple[str, ...], bool]:
        try:
            encoded = source.pictures.read(index)
        except UnreadablePicture:
            return b"", (), False
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                lossy = image.format in ("JPEG", "MPO", "AVIF") or encoded[8:16] == b"WEBPVP8 "
                notes = conversions(image)
                if channels != 4 and ("A" in image.getbands() or "transparency" in image.info):
                    notes += ("transparency is laid on white",)
                return digest, notes, lossy
        except Exception:  # whoever decodes it names the reason
            return digest, (), False

    names = [source.pictures.name(index) for index in order]
    digest, converted, lossy = hashlib.blake2b(digest_size=16), dict[str, list[str]](), list[str]()
    for name, (own, notes, compressed) in zip(names, in_threads(source, look, order), strict=True):
        digest.update(own)
        for note in notes:
            converted.setdefault(note, []).append(name)
        if compressed:
            lossy.append(name)
    return Survey(names, list(order), digest.hexdigest(), converted, lossy)


def stem(name: str) -> str:
    """A picture's name without the ending of an image file."""
    return str(Path(name).with_suffix("")) if Path(name).suffix.lower() in IMAGE_SUFFIXES else name


def samples_of(path: str) -> str:
    """The archive of a folder that `carrara sample` wrote, which also has a contact sheet and the single pictures; any
    other path as it is.

    Raises:
        UserError: the archive and the pictures in its folder are not the same, or there is no archive.
    """
    folder, archive = Path(path), Path(path) / ARCHIVE
    if not archive.is_file():
        if folder.is_dir() and (folder / SHEET).is_file() and any(folder.glob("seed*-[0-9]*.png")):
            raise UserError(
                f"{folder} contains sampled pictures and a contact sheet, {SHEET}, but no {ARCHIVE}: sample again, or "
                f"move {SHEET} away to measure the pictures.",
                key=str(archive),
                code="missing",
            )
        return path
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    _refuse_other_pictures(archive, [file for file in files if file != folder / SHEET])
    return str(archive)


def _refuse_other_pictures(archive: Path, files: list[Path]) -> None:
    """Raises UserError unless the files, if there are any, are the samples of the archive, in their order."""
    try:
        with np.load(archive, allow_pickle=False) as arrays:
            stored = arrays["arr_0"]
    except Exception:  # the reader of the archive names the reason
        return
    others: list[str] = []
    if files and len(files) == len(stored):
        for file, sample in zip(files, stored, strict=True):
            try:
                pixels = np.asarray(decode(file.read_bytes())[0])
            except UnreadablePicture:
                pixels = np.zeros(0)
            if not np.array_equal(pixels.reshape(-1), sample.reshape(-1)):
                others.append(file.name)
    if others or (files and len(files) != len(stored)):
        where = f", first {others[0]}" if others else f": {len(files):,} pictures and {len(stored):,} samples"
        raise UserError(
            f"{archive} and the pictures next to it are not of one run{where}. Name the archive itself to measure it, "
            "or move it away to measure the pictures.",
            key=str(archive),
            code="conflict",
        )


def _in_two_formats(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if stem(name) in seen or seen.add(stem(name))]  # type: ignore[func-returns-value]


def _few(names: Sequence[str]) -> str:
    more = len(names) - FIRST
    return ", ".join(names[:FIRST]) + (f" and {more:,} more" if more > 0 else "")
