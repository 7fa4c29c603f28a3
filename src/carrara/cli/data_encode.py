"""`carrara data encode`: the latents of a data set, made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass


def encode(
    path: Annotated[str, typer.Argument(help="A folder, parquet, zip or tar file, or the word 'digits'.")],
    codec: Annotated[str, typer.Option(help="A codec's folder, or the run that trained it.")],
    out: Annotated[Path, typer.Option(help="The cache; one that is there is brought up to date.")],
    resolution: Annotated[str, typer.Option(help="Size of the images: N or HxW.")],
    split: Annotated[str, typer.Option(help="Which split, where the data has several.")] = "train",
    channels: Annotated[int, typer.Option(help="1 gray, 3 RGB, 4 RGBA.")] = 3,
    resize: Annotated[str, typer.Option(help="adm, bicubic, lanczos, box or nearest.")] = "adm",
    flip: Annotated[bool, typer.Option("--flip", help="Encode every image mirrored, too.")] = False,
    caption_column: Annotated[str | None, typer.Option(help="The caption column, if not 'text'.")] = None,
    unreadable_limit: Annotated[float, typer.Option(help="Share of unreadable images that is skipped.")] = 0.01,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Encode the images in PATH and keep their latents: training on them then never sees a pixel.

    The same command again encodes only what is new or has changed.
    """
    import json
    import time
    from dataclasses import asdict
    from typing import cast

    from rich.console import Console
    from rich.progress import Progress

    from carrara import codecs
    from carrara.cli.data import parse_resolution
    from carrara.data import Preprocess, open_source
    from carrara.data.encode import encode_latents
    from carrara.data.preprocess import Resize
    from carrara.devices import resolve_device

    device = str(resolve_device(device))
    height, width = parse_resolution(resolution)
    prepare = Preprocess(height, width, channels, resize=cast(Resize, resize), flip=flip)
    found = codecs.load(codec, device)
    source = open_source(path, split=split, caption_column=caption_column, unreadable_limit=unreadable_limit)
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks = {phase: bar.add_task(f"{phase} the images", total=None) for phase in ("checking", "encoding")}
        done = encode_latents(
            source,
            prepare,
            found,
            out,
            batch_size=batch_size,
            device=device,
            progress=lambda phase, count, total: bar.update(tasks[phase], completed=count, total=total),
        )
    seconds = time.perf_counter() - start
    if as_json:
        print(json.dumps({**asdict(done), "seconds": seconds, "cache": str(out)}))
        return
    console = Console()
    for line in source.warnings:
        console.print(f"! {line}", style="yellow", markup=False)
    console.print(
        f"{out}: {done.images:,} images, {done.encoded:,} encoded now in {seconds:.1f} s, "
        f"{done.bytes_per_image:,.0f} bytes for each.",
        markup=False,
        soft_wrap=True,
    )
