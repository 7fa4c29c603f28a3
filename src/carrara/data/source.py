"""The one shape in which every layout arrives: numbered pictures with a label, a caption and a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from carrara.data.decode import UnreadablePicture, decode
from carrara.errors import UserError

_NAMES_SHOWN = 5


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(name: str) -> str:
    """A name that can be printed and written as UTF-8: what of a file's name is no UTF-8 shows as "\\udce9"."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


class Pictures(Protocol):
    """Where the encoded pictures lie: a folder, an archive, a table. Picklable; any thread may read."""

    encoded_bytes: int
    """Size of all encoded pictures together."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls this picture."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded picture.

        Raises:
            UnreadablePicture: this picture cannot be read.
            UserError: what holds it and others (a shard, a table) is gone.
        """
        ...


@dataclass(frozen=True)
class Example:
    """One picture as it lies in the data set: upright, 8 bits, mode L, RGB or RGBA, in its own size."""

    image: Image.Image
    label: int | None
    caption: str | None
    name: str


@dataclass
class Source:
    """A data set of any layout, with random access.

    Attributes:
        name: what the data set is called (its path).
        layout: how it was understood, a readable sentence.
        pictures: the encoded pictures.
        labels: int64 [N], 0..K-1, or None.
        captions: N texts (read when they are needed), or None.
        class_names: K names, or None.
        levels: distinct values of a channel, stored as 0..levels-1; 256 but for the scanned digits (17).
        unreadable_limit: the fraction of unreadable pictures that is skipped; above it they are refused.
        notices: what the reader of the layout found worth saying.
        unreadable: reason by index, for each picture found unreadable so far.
        conversions: how many pictures met so far were converted, by conversion.
        reported: which of these `new_notices` has reported.
        shard_sizes: pictures in each tar shard, in their order (for `ShuffledShards`), or None.
    """

    name: str
    layout: str
    pictures: Pictures
    labels: NDArray[np.int64] | None = None
    captions: Sequence[str] | None = None
    class_names: tuple[str, ...] | None = None
    levels: int = 256
    unreadable_limit: float = 0.01
    notices: list[str] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    conversions: Counter[str] = field(default_factory=Counter)
    reported: set[int | str] = field(default_factory=set)
    shard_sizes: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def has_captions(self) -> bool:
        """Whether every picture has a text."""
        return self.captions is not None

    def __getitem__(self, index: int) -> Example:
        """The picture at `index`, decoded.

        Raises:
            UserError: it cannot be read, or what holds it is gone.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} holds {len(self)} images, so there is no number {index}.")
        try:
            image, _ = self.decode(index)
        except UnreadablePicture as error:
            name = self.pictures.name(index)
            raise UserError(f"{name} cannot be read: {error}.", key=name, code="damaged") from error
        label = None if self.labels is None else int(self.labels[index])
        caption = None if self.captions is None else self.captions[index]
        return Example(image, label, caption, self.pictures.name(index))

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def decode(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """The picture and the conversions it needed.

        Raises:
            UnreadablePicture: it cannot be read.
            UserError: what holds it is gone.
        """
        return decode(self.pictures.read(index), self.pictures.name(index))

    def shown(self, image: Image.Image) -> Image.Image:
        """A picture for eyes: its levels spread over 0..255."""
        return image if self.levels == 256 else image.point(lambda value: value * 255 / (self.levels - 1))

    @property
    def warnings(self) -> list[str]:
        """What a user should know: notices of the layout, unreadable pictures, conversions met so far."""
        lines = list(self.notices)
        if self.unreadable:
            lines.append(f"{self._unreadable_sentence()} skipped.")
        lines += [f"{counted(count, 'image')}: {what}." for what, count in sorted(self.conversions.items())]
        return lines

    def new_notices(self) -> list[str]:
        """A sentence for each picture found unreadable, and each conversion met for the first time, since last time."""
        bad, converted = sorted(self.unreadable.keys() - self.reported), sorted(self.conversions.keys() - self.reported)
        self.reported |= {*bad, *converted}
        named = [(self.pictures.name(index), self.unreadable[index]) for index in bad]
        lines = [f"{name} cannot be read ({why}): another image replaces it." for name, why in named]
        return lines + [f"some images: {what}." for what in converted]

    def refuse_unreadable(self) -> None:
        """Raises UserError where more pictures were found unreadable than `unreadable_limit` allows."""
        if len(self.unreadable) > self.unreadable_limit * len(self):
            raise UserError(
                f"{self._unreadable_sentence()} more than the limit of {self.unreadable_limit:.2%}: "
                "repair or remove them, or raise data.unreadable_limit.",
                key="data.unreadable_limit",
                code="damaged",
            )

    def _unreadable_sentence(self) -> str:
        bad = [f"{self.pictures.name(i)} ({why})" for i, why in sorted(self.unreadable.items())[:_NAMES_SHOWN]]
        more = len(self.unreadable) - len(bad)
        names = ", ".join(bad) + (f" and {more} more" if more else "")
        return f"{len(self.unreadable)} of {len(self)} images in {self.name} cannot be read: {names};"
