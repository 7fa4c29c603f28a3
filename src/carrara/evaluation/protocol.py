"""What is measured against what: pictures made or read, a reference, and every figure of the one against the other.

All pictures, real ones too, are rounded to 8 bits before any feature network sees them: what is measured is
what files hold.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carrara.data import Example, Preprocess, Source, open_source
from carrara.data.batches import in_threads
from carrara.errors import UserError
from carrara.evaluation.collect import ROWS, Collected, collect
from carrara.evaluation.features import Features, Inception
from carrara.evaluation.measure import (
    measure_classes,
    measure_frechet,
    measure_inception_score,
    measure_memory,
    measure_pairs,
)
from carrara.evaluation.moments import Statistics
from carrara.evaluation.reference import read_statistics
from carrara.evaluation.stamp import Measurements, Stamp
from carrara.images import from_uint8, to_uint8
from carrara.model import DiffusionModel
from carrara.solvers import Solver

OWN_SIZE = "own size"


@dataclass(frozen=True)
class Pictures:
    """A set of pictures that are made or read while they are measured.

    Attributes:
        name: what messages and stamps call it.
        count: how many.
        batches: makes them anew: [B, C, H, W] in [-1, 1], of 8-bit values.
        labels: the name of each one's class, or None.
        split: which part of a data set.
        resize: how they came to their size.
        sampling: how a model made them; filled once the first batch is made.
    """

    name: str
    count: int
    batches: Callable[[], Iterator[Tensor]]
    labels: list[str] | None = None
    split: str = ""
    resize: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The real pictures, or what a file of statistics tells of them.

    Attributes:
        known: their features where they are at hand, else mean and covariance alone.
        name, split, resize: as of `Pictures`.
        content: hash of the pictures, or of the statistics.
        labels: the name of the class of each row kept, or None.
    """

    known: Collected | Statistics
    name: str
    content: str
    split: str = ""
    resize: str = ""
    labels: list[str] | None = None

    @property
    def count(self) -> int | None:
        """How many pictures; None where a statistics file does not say."""
        return self.known.count if isinstance(self.known, Statistics) else self.known.moments.count


@dataclass(frozen=True)
class Size:
    """To what size and colours pictures are brought; None leaves them as they are, all alike."""

    resolution: tuple[int, int] | None = None
    channels: int | None = None
    resize: str = "adm"


def model_pictures(
    model: DiffusionModel, name: str, count: int, batch_size: int = 64, **choices: int | float | str | Solver | None
) -> Pictures:
    """Samples of a model, made batch by batch and written nowhere; the classes in turn where it knows classes.

    Args:
        choices: `steps`, `solver`, `guidance`, `seed`, `eta` and `spacing` of `DiffusionModel.sample`.
    """
    refuse_fewer_than_one(count)
    names = None if model.labels is None else model.labels.names
    labels = None if names is None else [names[i % len(names)] for i in range(count)]
    sampling: dict[str, Any] = {}

    def batches() -> Iterator[Tensor]:
        for low in range(0, count, batch_size):
            rows = range(low, min(low + batch_size, count))
            told = None if names is None else [i % len(names) for i in rows]
            made = model.sample(told, len(rows), first=low, batch_size=batch_size, **choices)  # type: ignore[arg-type]
            sampling.update({key: made.protocol[key] for key in made.protocol if key not in ("carrara", "first")})
            if names is not None:
                sampling["classes"] = "in turn"
            yield _rounded(made.images)

    return Pictures(name, count, batches, labels, sampling=sampling)


def data_pictures(
    path: str, split: str = "train", count: int | None = None, size: Size | None = None, batch_size: int = 256
) -> Pictures:
    """The pictures of a folder, an npz or any other data set.

    Fewer than all, and more than the rows that are kept, are taken in an order drawn once for all: the first of
    a data set are often of one class.

    Raises:
        UserError: no pictures, fewer than `count`, one that cannot be read, or of another size or colour mode
            than the first where `size` does not say to which they are brought.
    """
    size = size or Size()
    source = open_source(_images_of(path), split)
    if len(source) == 0:
        raise UserError(f"{source.name} holds no images: give a folder, archive or data set that has some.")
    count = len(source) if count is None else count
    refuse_fewer_than_one(count)
    if count > len(source):
        raise UserError(f"{source.name} holds {len(source):,} images, fewer than the {count:,} asked for with --n.")
    order = list(range(count))
    if count < len(source) or count > ROWS:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count].tolist()
    first = source[order[0]].image
    height, width = size.resolution or (first.height, first.width)
    prepare = Preprocess(height, width, size.channels or len(first.getbands()), resize=size.resize)  # type: ignore[arg-type]

    def pixels(index: int) -> Tensor:
        example = source[index]
        _refuse_unlike(example, prepare, size)
        return prepare(example.image)

    def batches() -> Iterator[Tensor]:
        for low in range(0, count, batch_size):
            part = torch.stack(list(in_threads(source, pixels, order[low : low + batch_size])))
            yield _rounded(part.clamp(max=source.levels - 1).float().mul(2 / (source.levels - 1)).sub(1))

    described = OWN_SIZE if size.resolution is None else prepare.describe()
    return Pictures(source.name, count, batches, _class_names(source, order), split, described)


def _images_of(path: str) -> str:
    """The archive in a folder that `carrara sample` wrote, where a grid lies beside the single pictures."""
    archive = Path(path) / "samples.npz"
    return str(archive) if archive.is_file() else path


def refuse_fewer_than_one(count: int) -> None:
    """Raises UserError where no picture at all is asked for."""
    if count < 1:
        raise UserError(f"--n must be at least 1, not {count}.")


def _rounded(images: Tensor) -> Tensor:
    return from_uint8(to_uint8(images))


def _refuse_unlike(example: Example, prepare: Preprocess, size: Size) -> None:
    image = example.image
    if size.resolution is None and (image.height, image.width) != (prepare.height, prepare.width):
        raise UserError(
            f"{example.name} has {image.height}×{image.width} pixels, others {prepare.height}×{prepare.width}: "
            "say with --resolution to which size they are brought."
        )
    if size.channels is None and len(image.getbands()) != prepare.channels:
        raise UserError(
            f"{example.name} has {len(image.getbands())} channels, others {prepare.channels}: "
            "say with --channels to how many they are brought."
        )


def _class_names(source: Source, order: list[int]) -> list[str] | None:
    if source.labels is None or source.class_names is None:
        return None
    return [source.class_names[source.labels[i]] for i in order]


def holds_statistics(path: str) -> bool:
    """Whether a file is an `.npz` with `mu` and `sigma`, as ADM, pytorch-fid and clean-fid keep references."""
    if not (path.endswith(".npz") and Path(path).is_file()):
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {"mu", "sigma"} <= set(archive.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError):
        return False  # whoever reads its images says what is wrong


def statistics_reference(path: str, features: Features) -> Reference:
    """A reference of which only mean and covariance are known.

    Raises:
        UserError: the file is damaged, or was taken of other features.
    """
    from carrara.evaluation.features.checksum import file_checksum

    statistics = read_statistics(path, features_of(features))
    return Reference(statistics, path, file_checksum(path))


def collected_reference(pictures: Pictures, features: Features, rows: int = ROWS) -> Reference:
    """The features of real pictures."""
    found = collect(pictures.batches(), features, rows)
    labels = None if pictures.labels is None else pictures.labels[: len(found.rows)]
    return Reference(found, pictures.name, found.content, pictures.split, pictures.resize, labels)


def features_of(features: Features) -> dict[str, Any]:
    """What stamps and statistics files say of a feature network."""
    return {
        "features": features.name,
        "features_checksum": features.checksum,
        "preparation": features.preparation,
    }


def evaluate(
    samples: Pictures,
    reference: Reference,
    features: Features,
    train: Reference | None = None,
    judge: bool = False,
) -> Measurements:
    """Every figure that these inputs allow, each with its interval and its protocol.

    Args:
        train: the training images, for memorisation; the reference is then what "not memorised" looks like.
        judge: whether an SVC, fitted to the reference's features and classes, reads the samples' classes.

    Raises:
        UserError: sets of other sizes, colour modes or features, too few pictures, no images where only
            statistics are known, training images that are the reference, classes that the two do not share.
    """
    known = reference.known
    if train is not None:
        _refuse_training(train, reference)
    if judge:
        _refuse_judge(samples, reference)
    found = collect(_like(samples.batches(), reference, features), features)
    stamp = Stamp(
        n=found.moments.count,
        shape=found.shape,
        resize=reference.resize,
        reference=Path(reference.name).name,
        reference_split=reference.split,
        reference_hash=reference.content,
        reference_n=reference.count,
        sampling=dict(samples.sampling),
        **features_of(features),
    )
    figures = measure_frechet(found, known, stamp)
    if isinstance(known, Collected):
        figures |= measure_pairs(found, known, stamp)
    if isinstance(features, Inception):
        figures |= measure_inception_score(features.logits(found.rows), stamp)
    if train is not None and isinstance(train.known, Collected) and isinstance(known, Collected):
        about = stamp.with_settings(train=Path(train.name).name, train_split=train.split, train_hash=train.content)
        figures |= _memory(found, train.known, known, about)
    if samples.labels is not None:
        figures |= _classes(found, samples.labels[: len(found.rows)], reference, stamp, judge)
    return figures


def _like(batches: Iterator[Tensor], reference: Reference, features: Features) -> Iterator[Tensor]:
    """The same batches; the first is held against the reference, before hours go into the others."""
    for number, images in enumerate(batches):
        known = reference.known
        if number == 0 and isinstance(known, Collected):
            _refuse_other_shape("the samples", tuple(images.shape[1:]), reference.name, known.shape)
        if number == 0 and isinstance(known, Statistics):
            dimension = features(images[:1]).shape[1]
            if len(known.mean) != dimension:
                raise UserError(
                    f"{reference.name} holds statistics of {len(known.mean)} dimensions, the features "
                    f"'{features.name}' have {dimension}: take the reference in the features in use."
                )
        yield images


def _refuse_other_shape(what: str, shape: tuple[int, ...], name: str, other: tuple[int, ...]) -> None:
    if shape != other:
        ours, theirs = ("×".join(map(str, sides)) for sides in (shape, other))
        raise UserError(
            f"{what} are {ours} (channels, height, width) and the reference {name} is {theirs}: "
            "bring the images that are read to one --resolution and number of --channels."
        )


def _refuse_training(train: Reference, reference: Reference) -> None:
    if isinstance(reference.known, Statistics) or isinstance(train.known, Statistics):
        raise UserError("memorisation needs images: give the held-out ones as --reference, not their statistics.")
    if train.content == reference.content:
        raise UserError(
            f"the training images {train.name} are the reference itself: give held-out images as --reference."
        )
    _refuse_other_shape(f"the training images {train.name}", train.known.shape, reference.name, reference.known.shape)


def _refuse_judge(samples: Pictures, reference: Reference) -> None:
    if samples.labels is None:
        raise UserError(f"a judge compares what it reads with the classes asked for, and {samples.name} tells none.")
    if isinstance(reference.known, Statistics) or reference.labels is None:
        raise UserError(f"the judge learns from images with classes, and {reference.name} tells no classes.")
    unknown = sorted(set(samples.labels) - set(reference.labels))
    if unknown:
        raise UserError(f"the reference {reference.name} has no class '{unknown[0]}', so no judge can read it.")
    if len(set(reference.labels)) < 2:
        raise UserError(f"the judge learns to tell classes apart, and {reference.name} has only one.")


def _memory(samples: Collected, train: Collected, held_out: Collected, about: Stamp) -> Measurements:
    return measure_memory(samples.rows, train.rows, held_out.rows, about.with_settings(rows=len(samples.rows)))


def _classes(samples: Collected, labels: list[str], reference: Reference, stamp: Stamp, judge: bool) -> Measurements:
    names = sorted({*labels, *(reference.labels or ())})
    asked = torch.tensor([names.index(name) for name in labels])
    stamp = stamp.with_settings(rows=len(labels))
    if not judge or reference.labels is None or isinstance(reference.known, Statistics):
        return measure_classes(samples.rows, asked, None, stamp)
    from sklearn.svm import SVC

    real = torch.tensor([names.index(name) for name in reference.labels])
    reader = SVC(C=10).fit(reference.known.rows.numpy(), real.numpy())
    figures = measure_classes(samples.rows, asked, torch.from_numpy(reader.predict(samples.rows.numpy())), stamp)
    about = stamp.with_settings(judge="SVC(C=10) on the reference's features", judge_rows=len(real))
    figures["class_accuracy"] = replace(figures["class_accuracy"], stamp=about)
    return figures
