"""Sets of pictures that are made or read part by part while they are measured, and written nowhere.

All pictures, real ones too, are rounded to 8 bits before any feature network sees them: what is measured is
what files contain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carrara import codecs
from carrara.classifier import Classifier
from carrara.codecs import Codec
from carrara.data import Example, Preprocess, Source, open_source
from carrara.data.batches import in_threads, normalised
from carrara.distributed import run_on_rank0
from carrara.errors import UserError, nearest
from carrara.evaluation.survey import Survey, samples_of, survey
from carrara.images import from_uint8, to_uint8
from carrara.model import DiffusionModel
from carrara.modes import eval_mode
from carrara.sampling import UNSTAMPED
from carrara.solvers import Solver

OWN_SIZE = "own size"


@dataclass(frozen=True)
class Pictures:
    """A set of pictures, any part of which can be made or read.

    Attributes:
        name: its name in messages and stamps.
        count: how many.
        make: the pictures of these rows, [B, C, H, W] in [-1, 1].
        batch_size: how many are made at once.
        labels: the name of each one's class, or None.
        captions: what each one shows, in words, or None.
        split: which part of a data set.
        resize: how they came to their size.
        levels: how many values a pixel has.
        sampling: how a model made them; filled once the first part is made.
        survey: their names, conversions and hash, of pictures that are read from a data set.
        reading: how they are read, for caches; None for pictures that are made.
    """

    name: str
    count: int
    make: Callable[[range], Tensor]
    batch_size: int = 256
    labels: list[str] | None = None
    captions: list[str] | None = None
    split: str = ""
    resize: str = ""
    levels: int = 256
    sampling: dict[str, Any] = field(default_factory=dict)
    survey: Survey | None = None
    reading: str | None = None

    @property
    def parts(self) -> list[range]:
        """The rows, batch by batch: the same on every number of processes, so that each is made of the same numbers."""
        return [range(low, min(low + self.batch_size, self.count)) for low in range(0, self.count, self.batch_size)]

    def batches(self) -> Iterator[Tensor]:
        """All of them, in their order."""
        return map(self.make, self.parts)

    @property
    def notices(self) -> list[str]:
        """What reading them converts, in words."""
        return [] if self.survey is None else self.survey.notices(self.name)

    def reordered(self, order: Sequence[int]) -> Pictures:
        """The same pictures, row k being the old row `order[k]`; without classes and captions."""

        def make(rows: range) -> Tensor:
            return torch.cat([self.make(range(row, row + 1)) for row in order[rows.start : rows.stop]])

        return replace(self, make=make, labels=None, captions=None, survey=None, reading=None)


@dataclass(frozen=True)
class Size:
    """To what size and colours pictures are brought; None leaves them as they are, all alike."""

    resolution: tuple[int, int] | None = None
    channels: int | None = None
    resize: str = "adm"


def model_pictures(
    model: DiffusionModel,
    name: str,
    count: int,
    batch_size: int = 64,
    *,
    classifier: Classifier | None = None,
    proportions: Mapping[str, int] | None = None,
    **choices: int | float | str | Solver | None,
) -> Pictures:
    """Samples of a model, of the classes that it or the classifier has, where there are any.

    Args:
        classifier: guides the samples toward their classes.
        proportions: how many pictures of each class the reference has: samples take the classes in these proportions.
            None takes all classes in turn, so that each has as many as any other.
        choices: `steps`, `solver`, `guidance`, `classifier_scale`, `seed`, `eta` and `spacing` of
            `DiffusionModel.sample`.

    Raises:
        UserError: `proportions` without classes to choose among, or with one that is not known.
    """
    refuse_fewer_than_one(count)
    names = model.class_names(classifier)
    guide = {"classifier": classifier}
    classes = None if names is None else apportioned([1] * len(names), count)
    if proportions is not None:
        classes = apportioned(_counts(proportions, names, name), count)
    class_names = None if names is None or classes is None else [names[c] for c in classes]
    sampling: dict[str, Any] = {}

    def make(rows: range) -> Tensor:
        labels = None if classes is None else classes[rows.start : rows.stop]
        made = model.sample(labels, len(rows), first=rows.start, batch_size=len(rows), **guide, **choices)  # type: ignore[arg-type]
        sampling.update({key: value for key, value in made.metadata.items() if key not in UNSTAMPED})
        if classes is not None:
            sampling["classes"] = "in turn" if proportions is None else "in the reference's proportions"
        return _rounded(made.images)

    return Pictures(name, count, make, batch_size, class_names, levels=model.levels, sampling=sampling)


def apportioned(counts: Sequence[int], n: int) -> list[int]:
    """The classes of n samples, so that the first of them, however many, are already in the proportions of `counts`:
    the next one is always of the class that is furthest behind. Equal counts take the classes in turn."""
    weight, total = np.asarray(counts, dtype=np.int64), sum(counts)
    behind, classes = np.zeros_like(weight), []
    for _ in range(n):
        behind += weight
        chosen = int(behind.argmax())
        behind[chosen] -= total
        classes.append(chosen)
    return classes


def _counts(proportions: Mapping[str, int], names: Sequence[str] | None, name: str) -> list[int]:
    """The proportions in the order of the model's classes."""
    if names is None:
        raise UserError(
            f"{name} has no classes in whose proportions its samples could be.", key="classes", code="mismatch"
        )
    for own in proportions:
        if own not in names:
            raise UserError(
                f"{name} has no class '{own}', which the reference has: {nearest(own, names)}",
                key="classes",
                code="unknown",
            )
    return [proportions.get(own, 0) for own in names]


def decoded_pictures(codec: Codec, originals: Pictures, name: str, device: torch.device | str = "cpu") -> Pictures:
    """The originals after encoding (to the posterior's mode) and decoding."""

    def make(rows: range) -> Tensor:
        with torch.no_grad(), eval_mode(*[part for part in [codec] if isinstance(part, nn.Module)]):
            return _rounded(codec.decode(codec.encode(originals.make(rows).to(device)).mode()))

    about = {"codec": codec.kind, "codec_hash": codecs.content_hash(codec)}
    return Pictures(
        name, originals.count, make, originals.batch_size, originals.labels, originals.captions, sampling=about
    )


def data_pictures(
    path: str,
    split: str = "train",
    count: int | None = None,
    size: Size | None = None,
    batch_size: int = 256,
    rounded: bool = True,
    most: int = 10_000,
) -> Pictures:
    """The pictures of a folder, an npz or any other data set.

    Fewer than all, and more than `most`, of which the first are kept for metrics of pairs, are taken in an order
    drawn once for all: the first of a data set are often of one class.

    Args:
        rounded: to 8 bits. Without it, data of fewer levels (the scanned digits have 17) keep exactly those.

    Raises:
        UserError: no pictures, fewer than `count`, one that cannot be read, or of another size or colour mode
            than the first where `size` does not specify to which they are brought.
    """
    size = size or Size()
    source = open_source(samples_of(path), split)
    if len(source) == 0:
        raise UserError(
            f"{source.name} contains no images: give a folder, archive or data set that has some.",
            key=path,
            code="missing",
        )
    count = len(source) if count is None else count
    refuse_fewer_than_one(count)
    if count > len(source):
        raise UserError(
            f"{source.name} contains {len(source):,} images, fewer than the {count:,} of --n.", key="n", code="mismatch"
        )
    order = list(range(count))
    if count < len(source) or count > most:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count].tolist()
    first = source[order[0]].image
    height, width = size.resolution or (first.height, first.width)
    prepare = Preprocess(height, width, size.channels or len(first.getbands()), resize=size.resize)  # type: ignore[arg-type]

    def pixels(index: int) -> Tensor:
        example = source[index]
        _refuse_unlike(example, prepare, size)
        return prepare(example.image)

    def make(rows: range) -> Tensor:
        values = torch.stack(list(in_threads(source, pixels, [order[row] for row in rows])))
        images = normalised(values, source.levels)
        return _rounded(images) if rounded else images

    return Pictures(
        source.name,
        count,
        make,
        batch_size,
        _class_names(source, order),
        None if source.captions is None else [source.captions[i] for i in order],
        split,
        OWN_SIZE if size.resolution is None else prepare.describe(),
        256 if rounded else source.levels,
        survey=run_on_rank0(lambda: survey(source, order, prepare.channels)),
        reading=f"{prepare.describe()}, {'8 bits' if rounded else f'{source.levels} values'}",
    )


def refuse_fewer_than_one(count: int) -> None:
    """Raises UserError unless at least one picture is requested."""
    if count < 1:
        raise UserError(f"--n must be at least 1, not {count}.", key="n", code="invalid")


def refuse_other_shape(name: str, shape: Sequence[int], other_name: str, other: Sequence[int]) -> None:
    """Raises UserError unless two sets have one resolution and colour mode: a feature network would resize any."""
    if tuple(shape) != tuple(other):
        ours, theirs = ("×".join(map(str, sides)) for sides in (shape, other))
        raise UserError(
            f"{name}: {ours} (channels, height, width), but {other_name}: {theirs}. Bring the images that are read to "
            "one --resolution and number of --channels.",
            key="resolution",
            code="shape",
        )


def _rounded(images: Tensor) -> Tensor:
    return from_uint8(to_uint8(images))


def _refuse_unlike(example: Example, prepare: Preprocess, size: Size) -> None:
    image = example.image
    if size.resolution is None and (image.height, image.width) != (prepare.height, prepare.width):
        raise UserError(
            f"{example.name} has {image.height}×{image.width} pixels, others {prepare.height}×{prepare.width}: "
            "give the size to which they are brought with --resolution.",
            key="resolution",
            code="mismatch",
        )
    if size.channels is None and len(image.getbands()) != prepare.channels:
        raise UserError(
            f"{example.name} has {len(image.getbands())} channels, others {prepare.channels}: "
            "give the number to which they are brought with --channels.",
            key="channels",
            code="mismatch",
        )


def _class_names(source: Source, order: list[int]) -> list[str] | None:
    if source.labels is None or source.class_names is None:
        return None
    return [source.class_names[source.labels[i]] for i in order]
