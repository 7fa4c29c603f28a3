"""What is measured against what: a set of pictures, a reference, and every figure of the one against the other.

Features are taken by all processes together; the figures are then computed by the first and told to the others.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from carrara.classifier import Classifier
from carrara.codecs.perceptual import Perceptual
from carrara.distributed import first_tells, in_turn
from carrara.errors import UserError, nearest
from carrara.evaluation import judge as judges
from carrara.evaluation.collect import ROWS, Collected, collect_together
from carrara.evaluation.features import Features, Inception
from carrara.evaluation.features.checksum import file_checksum
from carrara.evaluation.measure import (
    measure_captions,
    measure_classes,
    measure_each_class,
    measure_frechet,
    measure_inception_score,
    measure_memory,
    measure_pairs,
    measure_reconstruction,
)
from carrara.evaluation.moments import Statistics
from carrara.evaluation.pictures import Pictures
from carrara.evaluation.reconstruction import likeness
from carrara.evaluation.reference import read_statistics
from carrara.evaluation.stamp import Measurements, Stamp
from carrara.images import to_uint8

LPIPS_SIDE = 16
"""Pixels of the smallest side that VGG-16 can halve four times."""

Judge = Literal["svc"] | Classifier
"""Who reads the classes of samples."""

Progress = Callable[[int], None]
"""Is told after each batch how many pictures it held."""


@dataclass(frozen=True)
class Reference:
    """The real pictures, or what a file of statistics tells of them.

    Attributes:
        statistics: mean and covariance of their features.
        images: their features, where pictures are at hand.
        name, split, resize: as of `Pictures`.
        content: hash of the pictures, or of the file of statistics.
        labels: the name of the class of each row of `images`, or None.
        pictures: the pictures themselves, to show one; None where only statistics are known.
        notices: what a user should know of the file.
    """

    statistics: Statistics
    images: Collected | None
    name: str
    content: str
    split: str = ""
    resize: str = ""
    labels: list[str] | None = None
    pictures: Pictures | None = None
    notices: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """How many pictures; None where a statistics file does not say."""
        return self.statistics.count


@dataclass(frozen=True)
class Evaluation:
    """What was found of a set of samples.

    Attributes:
        figures: every figure, with its interval and protocol.
        samples: their features, and the first of them as pictures.
        labels: the names of their classes, or None.
    """

    figures: Measurements
    samples: Collected
    labels: list[str] | None = None


# ---- references ---------------------------------------------------------------------------------------------


def holds(path: str, *names: str) -> bool:
    """Whether a file is an `.npz` with arrays of these names."""
    if not (path.endswith(".npz") and Path(path).is_file()):
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return set(names) <= set(archive.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError):
        return False  # whoever reads its images says what is wrong


def holds_statistics(path: str) -> bool:
    """Whether a file has `mu` and `sigma`, as ADM, pytorch-fid and clean-fid keep references."""
    return holds(path, "mu", "sigma")


def holds_images(path: str) -> bool:
    """Whether a file has images, as ADM's references have beside their statistics."""
    return holds(path, "arr_0")


def statistics_reference(
    path: str, features: Features, pictures: Pictures | None = None, progress: Progress | None = None
) -> Reference:
    """A reference of which mean and covariance are known and, in ADM's files, some of the pictures.

    The Fréchet distance takes the statistics, which are of the whole set, the figures of pairs the pictures.
    Where the statistics are of other features than the ones in use, pictures serve for everything.

    Args:
        pictures: those in the same file.

    Raises:
        UserError: the file is damaged, or was taken of other features.
    """
    statistics = read_statistics(path, features_of(features))
    notices = []
    if holds(path, "mu_s", "sigma_s"):
        notices.append(
            f"{path} holds the statistics of sFID too (mu_s, sigma_s): they are of other features and are not used."
        )
    if pictures is None:
        return Reference(statistics, None, path, file_checksum(path), notices=tuple(notices))
    found = collect_together(pictures, features, progress=progress)
    if len(statistics.mean) != found.moments.dimension:
        notices.append(
            f"{path} holds statistics of {len(statistics.mean)} dimensions, the features '{features.name}' have "
            f"{found.moments.dimension}: its {found.moments.count:,} images are the reference instead."
        )
        statistics = found.moments.statistics()
    labels = None if pictures.labels is None else pictures.labels[: len(found.rows)]
    return Reference(
        statistics,
        found,
        path,
        file_checksum(path),
        resize=pictures.resize,
        labels=labels,
        pictures=pictures,
        notices=tuple(notices),
    )


def collected_reference(
    pictures: Pictures, features: Features, rows: int = ROWS, progress: Progress | None = None
) -> Reference:
    """The features of real pictures, of the first `rows` of them one by one."""
    found = collect_together(pictures, features, rows, progress=progress)
    labels = None if pictures.labels is None else pictures.labels[: len(found.rows)]
    return Reference(
        found.moments.statistics(),
        found,
        pictures.name,
        found.content,
        pictures.split,
        pictures.resize,
        labels,
        pictures,
    )


def features_of(features: Features) -> dict[str, Any]:
    """What stamps and statistics files say of a feature network."""
    return {
        "features": features.name,
        "features_checksum": features.checksum,
        "preparation": features.preparation,
    }


# ---- figures ------------------------------------------------------------------------------------------------


def evaluate(
    samples: Pictures,
    reference: Reference,
    features: Features,
    train: Reference | None = None,
    judge: Judge | None = None,
    each_class: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Every figure that these inputs allow, each with its interval and its protocol.

    CLIP features of samples that have captions give the CLIP score and caption retrieval as well.

    Args:
        train: the training images, for memorisation; the reference is then what "not memorised" looks like.
        judge: who reads the samples' classes: "svc", fitted to the reference's features and classes, or a trained
            classifier.
        each_class: whether the figures of single classes are wanted too.

    Raises:
        UserError: sets of other sizes, colour modes or features, too few pictures, no images where only
            statistics are known, training images that are the reference, classes that the two do not share.
    """
    if train is not None:
        _refuse_training(train, reference)
    if judge is not None:
        _refuse_judge(samples, reference, judge)
    if each_class and (samples.labels is None or reference.labels is None):
        raise UserError("the figures of each class need samples and a reference with classes: leave --per-class out.")
    read = judge.read if isinstance(judge, Classifier) else None

    def check(images: Tensor) -> None:
        _refuse_unlike(images, reference, features)

    found = collect_together(samples, features, check=check, read=read, progress=progress)
    stamp = stamp_of(samples, reference, features, found)

    def figures() -> Measurements:
        measured = measure_frechet(found, reference.statistics, stamp)
        if reference.images is not None:
            measured |= measure_pairs(found, reference.images, stamp)
        if isinstance(features, Inception):
            measured |= measure_inception_score(features.logits(found.rows), stamp)
        if train is not None:
            measured |= _memory(found, train, reference, stamp)
        if samples.labels is not None:
            measured |= _classes(found, samples.labels[: len(found.rows)], reference, stamp, judge, each_class)
        if samples.captions is not None:
            measured |= _captions(found, samples.captions, features, stamp)
        return measured

    return Evaluation(first_tells(figures), found, samples.labels)


def stamp_of(samples: Pictures, reference: Reference, features: Features, found: Collected) -> Stamp:
    """The protocol that all figures of the samples share."""
    return Stamp(
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


def _refuse_unlike(images: Tensor, reference: Reference, features: Features) -> None:
    """Raises UserError where samples, seen in a first batch, cannot be held against the reference."""
    if reference.images is not None:
        _refuse_other_shape("the samples", tuple(images.shape[1:]), reference.name, reference.images.shape)
        return
    dimension = features(images[:1]).shape[1]
    if len(reference.statistics.mean) != dimension:
        raise UserError(
            f"{reference.name} holds statistics of {len(reference.statistics.mean)} dimensions, the features "
            f"'{features.name}' have {dimension}: take the reference in the features in use."
        )


def _refuse_other_shape(what: str, shape: tuple[int, ...], name: str, other: tuple[int, ...]) -> None:
    if shape != other:
        ours, theirs = ("×".join(map(str, sides)) for sides in (shape, other))
        raise UserError(
            f"{what} are {ours} (channels, height, width) and the reference {name} is {theirs}: "
            "bring the images that are read to one --resolution and number of --channels."
        )


def _refuse_training(train: Reference, reference: Reference) -> None:
    if reference.images is None or train.images is None:
        raise UserError("memorisation needs images: give the held-out ones as --reference, not their statistics.")
    if train.content == reference.content:
        raise UserError(
            f"the training images {train.name} are the reference itself: give held-out images as --reference."
        )
    _refuse_other_shape(f"the training images {train.name}", train.images.shape, reference.name, reference.images.shape)


def _refuse_judge(samples: Pictures, reference: Reference, judge: Judge) -> None:
    if samples.labels is None:
        raise UserError(f"a judge compares what it reads with the classes asked for, and {samples.name} tells none.")
    if isinstance(judge, Classifier):
        unknown = sorted(set(samples.labels) - set(judge.names))
        if unknown:
            raise UserError(f"the judge knows no class '{unknown[0]}': {nearest(unknown[0], judge.names)}")
        return
    if reference.images is None or reference.labels is None:
        raise UserError(f"the judge learns from images with classes, and {reference.name} tells no classes.")
    unknown = sorted(set(samples.labels) - set(reference.labels))
    if unknown:
        raise UserError(f"the reference {reference.name} has no class '{unknown[0]}', so no judge can read it.")
    if len(set(reference.labels)) < 2:
        raise UserError(f"the judge learns to tell classes apart, and {reference.name} has only one.")


def _memory(samples: Collected, train: Reference, held_out: Reference, stamp: Stamp) -> Measurements:
    assert train.images is not None  # refused before
    assert held_out.images is not None
    about = stamp.with_settings(
        train=Path(train.name).name, train_split=train.split, train_hash=train.content, rows=len(samples.rows)
    )
    return measure_memory(samples.rows, train.images.rows, held_out.images.rows, about)


def _classes(
    samples: Collected, labels: list[str], reference: Reference, stamp: Stamp, judge: Judge | None, each_class: bool
) -> Measurements:
    known = reference.labels or []
    names = sorted({*labels, *known, *(judge.names if isinstance(judge, Classifier) else ())})
    asked = _numbers(labels, names)
    read, about = _read(samples, reference, judge, names)
    stamp = stamp.with_settings(rows=len(labels))
    figures = measure_classes(samples.rows, asked, read, stamp)
    if each_class:
        assert reference.images is not None  # refused before
        rows = reference.images.rows
        figures |= measure_each_class(samples.rows, asked, read, rows, _numbers(known, names), names, stamp)
    return {
        name: replace(figure, stamp=figure.stamp.with_settings(**about)) if "accuracy" in name else figure
        for name, figure in figures.items()
    }


def _numbers(labels: list[str], names: list[str]) -> Tensor:
    places = {name: index for index, name in enumerate(names)}
    return torch.tensor([places[label] for label in labels])


def _read(
    samples: Collected, reference: Reference, judge: Judge | None, names: list[str]
) -> tuple[Tensor | None, dict[str, Any]]:
    """The classes that the judge reads, as places in `names`, int64 [N], and what a stamp says of the judge."""
    if judge is None:
        return None, {}
    if isinstance(judge, Classifier):
        assert samples.read is not None
        read = _numbers([judge.names[i] for i in samples.read.tolist()], names)
        return read, {"judge": f"classifier, {judge.origin}".rstrip(", ")}
    assert reference.images is not None  # refused before
    assert reference.labels is not None
    real = _numbers(reference.labels, names)
    about = {"judge": f"{judges.SVC} on the reference's features", "judge_rows": len(real)}
    return judges.svc(reference.images.rows, real)(samples.rows), about


def _captions(samples: Collected, captions: list[str], features: Features, stamp: Stamp) -> Measurements:
    """CLIP score and caption retrieval where the features are CLIP's; nothing with any other."""
    from carrara.evaluation.features.pretrained import Clip

    if not isinstance(features, Clip):
        return {}
    told = captions[: len(samples.rows)]
    texts = torch.cat([features.texts(told[low : low + 256]).cpu() for low in range(0, len(told), 256)])
    return measure_captions(samples.rows, texts, stamp.with_settings(rows=len(told)))


# ---- pairs of pictures ----------------------------------------------------------------------------------------


def reconstruction(
    pictures: Pictures,
    originals: Pictures,
    perceptual: Perceptual | None = None,
    checksum: str = "",
    progress: Progress | None = None,
) -> Measurements:
    """PSNR, SSIM and, where it is given, a learned distance of pictures against what they should be, one by one.

    Args:
        perceptual: LPIPS with its weights.
        checksum: the SHA-256 of these weights.

    Raises:
        UserError: other numbers or sizes of pictures, or the same numbers in the file names in another order.
    """
    if pictures.count != originals.count:
        raise UserError(
            f"{pictures.name} holds {pictures.count:,} pictures and {originals.name} {originals.count:,}: "
            "give one original for each picture, in the same order."
        )

    _check_pairs(pictures, originals)

    def work(rows: range) -> tuple[dict[str, Tensor], tuple[int, ...], bytes]:
        images, targets = pictures.make(rows).cpu(), originals.make(rows)
        _refuse_other_shape(pictures.name, tuple(images.shape[1:]), originals.name, tuple(targets.shape[1:]))
        if perceptual is not None and min(images.shape[2:]) < LPIPS_SIDE:
            raise UserError(
                f"LPIPS's network halves images four times, and those of {originals.name} have fewer than "
                f"{LPIPS_SIDE} pixels a side: leave --lpips out."
            )
        content = hashlib.blake2b(to_uint8(targets).numpy().tobytes(), digest_size=16).digest()
        return likeness(images, targets, perceptual), tuple(images.shape[1:]), content

    found = []
    for part in in_turn(originals.parts, work):
        found.append(part)
        if progress is not None:
            progress(len(part[0]["psnr"]))
    values, shapes, digests = zip(*found, strict=True)
    joined = {name: torch.cat([part[name] for part in values]) for name in values[0]}
    stamp = Stamp(
        n=pictures.count,
        shape=shapes[0],
        resize=originals.resize,
        reference=Path(originals.name).name,
        reference_split=originals.split,
        reference_hash=hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest(),
        sampling={"pictures": Path(pictures.name).name, **pictures.sampling},
    )
    figures = first_tells(lambda: measure_reconstruction(joined, stamp))
    if "lpips" in figures:
        about = figures["lpips"].stamp.with_settings(weights=checksum)
        figures["lpips"] = replace(figures["lpips"], stamp=about)
    return figures


def _check_pairs(pictures: Pictures, originals: Pictures) -> None:
    """Raises UserError where file names number the same pictures in another order: 10.png comes before 2.png, but
    0010.png after 0002.png."""
    if pictures.files is None or originals.files is None:
        return
    ours, theirs = (_file_numbers(files) for files in (pictures.files, originals.files))
    if len(set(ours)) < len(ours) or None in ours or sorted(map(str, ours)) != sorted(map(str, theirs)):
        return
    for own, other, left, right in zip(ours, theirs, pictures.files, originals.files, strict=True):
        if own != other:
            raise UserError(
                f"{left} would be compared with {right}: number the files of {pictures.name} and {originals.name} "
                "alike, with leading zeros.",
                key=pictures.name,
                code="mismatch",
            )


def _file_numbers(files: list[str]) -> list[int | None]:
    """The last number in the stem of each file."""
    digits = [re.findall(r"[0-9]+", Path(name).stem) for name in files]
    return [int(found[-1]) if found else None for found in digits]
