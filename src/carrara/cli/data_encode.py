"""`carrara data encode`: the latents of a data set, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def encode(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="A folder, parquet, zip or tar file, or the word 'digits'.")],
    codec: Annotated[str, typer.Option(help="A codec's folder, or the run that trained it.")],
    out: Annotated[Path, typer.Option(help="The cache; one that is there is brought up to date.")],
    resolution: Annotated[str, typer.Option(help="Size of the images: N or HxW.")],
    split: Annotated[str, typer.Option(help="Which split, where the data has several.")] = "train",
    channels: Annotated[int, typer.Option(help="1 gray, 3 RGB, 4 RGBA.")] = 3,
    resize: Annotated[str, typer.Option(help="adm, bicubic, lanczos, box or nearest.")] = "adm",
    flip: Annotated[bool, typer.Option("--flip", help="Encode every image mirrored, too.")] = False,
    caption_column: Annotated[str | None, typer.Option(help="The caption column, if not 'text'.")] = None,
    unreadable_limit: Annotated[float, typer.Option(help="Fraction of unreadable images that is skipped.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="Images encoded at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Encode the images in PATH and keep their latents: training on them then never reads a pixel.

    The same command again encodes only what is new or has changed.
    """
    import json

    from carrara.app.data import EncodeRequest
    from carrara.app.data import encode as events
    from carrara.app.events import Saved
    from carrara.cli.console import console, show
    from carrara.cli.options import typed

    for event in show(events(EncodeRequest(**typed(context))), json_output):
        if isinstance(event, Saved) and json_output:
            print(json.dumps(event.about))
        elif isinstance(event, Saved):
            done = event.about
            console.print(
                f"{event.path}: {done['images']:,} images, {done['encoded']:,} encoded now in {done['seconds']:.1f} s, "
                f"{done['bytes_per_image']:,.0f} bytes for each."
            )
