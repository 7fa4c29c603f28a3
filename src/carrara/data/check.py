"""What is in a data set, and what would go wrong with it, before a day is lost."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carrara.data import duplicates
from carrara.data.batches import in_threads
from carrara.data.decode import UnreadablePicture
from carrara.data.layouts import open_source
from carrara.data.order import refuse_fewer_than
from carrara.data.preprocess import Preprocess
from carrara.data.preview import save_preview
from carrara.data.source import Source, counted
from carrara.errors import UserError

_USUAL_SIDES = (8, 16, 32, 64, 128, 256)


@dataclass
class DataReport:
    """The findings of `check_data`.

    Attributes:
        path, split, layout: what was looked at, and as what it was understood.
        images: how many there are; `looked_at` of them were decoded.
        classes: images in each class, or None.
        sizes: {"width", "height", "shorter_side"}: smallest, median and largest; "shapes": distinct sizes;
            "aspect": smallest and largest width / height.
        modes: how many pictures are gray (L), RGB or RGBA once decoded; "gray in RGB" of them have no colour.
        captions: count, empty, distinct, and words (smallest, median, largest); or None.
        unreadable: reason by name.
        exact_duplicates, near_duplicates: groups of names.
        duplicate_method: how they were found.
        suggested: {"resolution": [height, width], "channels"} that fit these pictures.
        prepared: what training would do to each picture, a sentence.
        plan: {"batch_size", "steps", "epochs", "hours"}: hours None without a speed to reckon with.
        warnings: worth knowing.
        problems: training would fail.
        timings: seconds and decoded images per second of this check (the one part that varies).
    """

    path: str
    split: str
    layout: str
    images: int
    looked_at: int
    classes: dict[str, int] | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    captions: dict[str, Any] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    exact_duplicates: list[list[str]] = field(default_factory=list)
    near_duplicates: list[list[str]] = field(default_factory=list)
    duplicate_method: str = duplicates.METHOD
    suggested: dict[str, Any] = field(default_factory=dict)
    prepared: str = ""
    plan: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether training could start."""
        return not self.problems

    def to_json(self) -> str:
        """All of it, with "ok", as JSON."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


@dataclass
class _Look:
    """What one readable picture showed."""

    index: int
    size: tuple[int, int]
    mode: str
    pixels: bytes
    gray: NDArray[np.uint8]
    colour: NDArray[np.uint8]


def check_data(
    path: str | Path,
    *,
    split: str = "train",
    resolution: tuple[int, int] | None = None,
    channels: int | None = None,
    batch_size: int = 64,
    steps: int = 10_000,
    images_per_second: float | None = None,
    caption_column: str | None = None,
    unreadable_limit: float = 0.01,
    sample: int | None = None,
    preview: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Decode the pictures of a data set and report what training would meet.

    Args:
        path, split, caption_column, unreadable_limit: as for `open_source`.
        resolution: height and width to train at; None takes the suggested one.
        channels: 1, 3 or 4; None takes the suggested number.
        batch_size, steps: the global batch and its number of steps, for the epochs.
        images_per_second: training speed, for the hours.
        sample: look at this many evenly spaced pictures only; None looks at all.
        preview: write three pictures before and after preparation here, as one image.
        progress: called with (pictures looked at, pictures to look at).

    Raises:
        UserError: there is no data set, or its description is at odds with its files.
    """
    for name, value in (("batch_size", batch_size), ("steps", steps), ("sample", sample)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.", key=name)
    if images_per_second is not None and not images_per_second > 0:
        raise UserError(f"images_per_second must be above 0, not {images_per_second}.", key="images_per_second")
    start = time.perf_counter()
    source = open_source(path, split, unreadable_limit, caption_column)
    indices = np.unique(np.linspace(0, len(source) - 1, min(sample or len(source), len(source))).astype(int)).tolist()
    looks = _look(source, indices, progress)
    seconds = time.perf_counter() - start
    report = DataReport(str(path), split, source.layout, len(source), len(indices))
    report.unreadable = {source.pictures.name(i): why for i, why in sorted(source.unreadable.items())}
    report.classes = _classes(source)
    report.captions = _captions(source, indices)
    report.timings = {"seconds": round(seconds, 3), "images_per_second": round(len(indices) / seconds, 1)}
    report.problems = _problems(source, batch_size)
    if looks:
        _measure(report, looks)
        _find_duplicates(report, source, looks)
        height, width = resolution or report.suggested["resolution"]
        prepare = Preprocess(height, width, channels or report.suggested["channels"])
        report.prepared = prepare.describe()
        _warn(report, source, looks, prepare)
        if preview is not None:
            save_preview(source, prepare, [look.index for look in looks], preview)
    epochs = steps * batch_size / len(source)
    hours = None if images_per_second is None else round(steps * batch_size / images_per_second / 3600, 3)
    report.plan = {"batch_size": batch_size, "steps": steps, "epochs": round(epochs, 2), "hours": hours}
    return report


def _look(source: Source, indices: Sequence[int], progress: Callable[[int, int], None] | None) -> list[_Look]:
    def one(index: int) -> tuple[_Look, tuple[str, ...]] | str:
        try:
            image, notes = source.decode(index)
        except UnreadablePicture as error:
            return str(error)
        gray, colour = duplicates.thumbnails(source.shown(image))
        return _Look(index, image.size, image.mode, duplicates.pixel_hash(image), gray, colour), notes

    looks = []
    for done, (index, seen) in enumerate(zip(indices, in_threads(source, one, indices), strict=True), 1):
        if isinstance(seen, str):
            source.unreadable[index] = seen
        else:
            looks.append(seen[0])
            source.conversions.update(seen[1])
        if progress is not None and (done % 256 == 0 or done == len(indices)):
            progress(done, len(indices))
    return looks


def _classes(source: Source) -> dict[str, int] | None:
    if source.labels is None or source.class_names is None:
        return None
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    return {name: int(count) for name, count in zip(source.class_names, counts, strict=True)}


def _captions(source: Source, indices: Sequence[int]) -> dict[str, Any] | None:
    if source.captions is None:
        return None
    texts = [source.captions[i] for i in indices]
    words = [len(text.split()) for text in texts]
    return {
        "count": len(texts),
        "empty": sum(not text.strip() for text in texts),
        "distinct": len(set(texts)),
        "words": _range(words),
    }


def _range(values: Sequence[int]) -> list[int]:
    return [int(min(values)), int(np.median(values)), int(max(values))]


def _problems(source: Source, batch_size: int) -> list[str]:
    found = []
    for refuse in (source.refuse_unreadable, lambda: refuse_fewer_than(batch_size, len(source), source.name)):
        try:
            refuse()
        except UserError as error:
            found.append(str(error))
    return found


def _measure(report: DataReport, looks: Sequence[_Look]) -> None:
    width, height = (np.array(side) for side in zip(*(look.size for look in looks), strict=True))
    shorter = np.minimum(width, height)
    report.sizes = {
        "width": _range(width.tolist()),
        "height": _range(height.tolist()),
        "shorter_side": _range(shorter.tolist()),
        "shapes": len({look.size for look in looks}),
        "aspect": [round(float((width / height).min()), 3), round(float((width / height).max()), 3)],
    }
    report.modes = dict(Counter(look.mode for look in looks))
    colourless = sum(look.mode == "RGB" and bool((np.ptp(look.colour, axis=2) <= 1).all()) for look in looks)
    if colourless:
        report.modes["gray in RGB"] = colourless
    # At most one picture in ten would have to be enlarged; above 256 pixel diffusion is a matter of choice.
    room = float(np.percentile(shorter, 10, method="lower"))
    side = max((side for side in _USUAL_SIDES if side <= room), default=int(max(room, 1)))
    gray = report.modes.get("L", 0) + colourless
    report.suggested = {"resolution": [side, side], "channels": 1 if gray == len(looks) else 3}


def _find_duplicates(report: DataReport, source: Source, looks: Sequence[_Look]) -> None:
    name = source.pictures.name
    exact = duplicates.exact_groups([look.pixels for look in looks])
    report.exact_duplicates = [[name(looks[i].index) for i in group] for group in exact]
    copies = {i for group in exact for i in group[1:]}
    distinct = [look for i, look in enumerate(looks) if i not in copies]
    hashes = duplicates.perceptual_hashes(np.stack([look.gray for look in distinct]))
    near = duplicates.near_groups(hashes, np.stack([look.colour for look in distinct]))
    report.near_duplicates = [[name(distinct[i].index) for i in group] for group in near]


def _warn(report: DataReport, source: Source, looks: Sequence[_Look], prepare: Preprocess) -> None:
    warn = report.warnings.append
    report.warnings += source.warnings if report.ok else source.notices
    smaller = sum(look.size[0] < prepare.width or look.size[1] < prepare.height for look in looks)
    if smaller:
        warn(f"{smaller} of {len(looks)} images would be enlarged to {prepare.height}×{prepare.width}.")
    cut = [1 - _fraction_kept(look.size, prepare) for look in looks]
    if max(cut) > 0.05:
        warn(f"the centre crop cuts away {float(np.mean(cut)):.0%} of a picture on average, {max(cut):.0%} at most.")
    if report.modes.get("RGBA") and prepare.channels != 4:
        warn(f"{report.modes['RGBA']} of {len(looks)} images would be laid on white, for their transparency.")
    if prepare.channels == 1 and (colour := len(looks) - report.modes.get("L", 0) - report.modes.get("gray in RGB", 0)):
        warn(f"{colour} of {len(looks)} images would lose their colour.")
    if report.classes:
        few, many = min(report.classes.values()), max(report.classes.values())
        if few == 0 or many > 10 * few:
            warn(f"the classes are uneven: the rarest has {few} images, the most frequent {many}.")
    if report.captions and report.captions["empty"]:
        warn(f"captions are empty: {report.captions['empty']} of {report.captions['count']}.")
    blank = [look for look in looks if np.ptp(look.gray) == 0 and np.ptp(look.colour.reshape(-1, 3), axis=0).max() == 0]
    if blank:
        warn(f"images look blank: {len(blank)}, the first is {source.pictures.name(blank[0].index)}.")
    for kind, groups in (("exact", report.exact_duplicates), ("near", report.near_duplicates)):
        if groups:
            warn(f"{kind} duplicates: {sum(map(len, groups))} images in {counted(len(groups), 'group')}.")


def _fraction_kept(size: tuple[int, int], prepare: Preprocess) -> float:
    width, height = size
    scale = max(prepare.width / width, prepare.height / height)
    return min(1.0, prepare.width * prepare.height / (width * height * scale**2))
