"""Looking at a data set before training on it, and encoding it into a codec's latents."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pydantic import Field

from carrara.app.events import Event, Metrics, Notice, Saved, StepDone
from carrara.app.request import Request, Resolution, check_file
from carrara.app.stream import Report, streamed
from carrara.data.preprocess import Resize


class CheckRequest(Request):
    """What to look at; see `carrara.data.check.check_data`."""

    path: str
    split: str = "train"
    resolution: Resolution | None = None
    channels: int | None = None
    batch_size: int = Field(64, ge=1)
    steps: int = Field(10_000, ge=1)
    images_per_second: float | None = Field(None, gt=0)
    caption_column: str | None = None
    unreadable_limit: float = 0.01
    sample: int | None = Field(None, ge=1)
    preview: Path | None = None


class EncodeRequest(Request):
    """What to encode; see `carrara.data.encode.encode_latents`.

    Attributes:
        path: the images.
        codec: a codec's folder, or a run that trained one.
        out: the cache; one that is there is brought up to date.
    """

    path: str
    codec: str
    out: Path
    resolution: Resolution
    split: str = "train"
    channels: int = 3
    resize: Resize = "adm"
    flip: bool = False
    caption_column: str | None = None
    unreadable_limit: float = 0.01
    batch_size: int = Field(32, ge=1)
    device: str = "auto"


def check(request: CheckRequest) -> Iterator[Event]:
    """Yields how many images were looked at, then `Metrics` "data" (`result`: `DataReport`).

    Raises:
        UserError: there is no data set, or its description is at odds with its files.
    """
    from carrara.data.check import check_data

    check_file(request.preview, "preview")
    arguments = {name: getattr(request, name) for name in CheckRequest.model_fields if name != "path"}

    def work(report: Report) -> None:
        def progress(done: int, total: int) -> None:
            report(StepDone("looking at the images", done, total))

        checked = check_data(request.path, **arguments, progress=progress)
        report(Metrics("data", {"ok": checked.ok, **asdict(checked)}, checked))

    return streamed(work)


def encode(request: EncodeRequest) -> Iterator[Event]:
    """Keep the latents of a data set, so that training on them never reads a pixel; again, only of what has changed.

    Raises:
        UserError: no data, no codec, or a cache of something else.
    """
    from carrara import codecs
    from carrara.data import Preprocess, open_source
    from carrara.data.encode import encode_latents
    from carrara.devices import resolve_device

    device = resolve_device(request.device)
    height, width = request.resolution
    prepare = Preprocess(height, width, request.channels, resize=request.resize, flip=request.flip)
    codec = codecs.load(request.codec, device)
    source = open_source(
        request.path,
        split=request.split,
        caption_column=request.caption_column,
        unreadable_limit=request.unreadable_limit,
    )

    def work(report: Report) -> None:
        def progress(phase: str, done: int, total: int) -> None:
            report(StepDone(f"{phase} the images", done, total))

        start = time.perf_counter()
        size, where = request.batch_size, str(device)
        done = encode_latents(source, prepare, codec, request.out, batch_size=size, device=where, progress=progress)
        about = {**asdict(done), "seconds": time.perf_counter() - start, "cache": str(request.out)}
        for warning in source.warnings:
            report(Notice(warning))
        report(Saved("latents", request.out, about))

    return streamed(work)
