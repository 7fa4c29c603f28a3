"""`carrara ema`: another width of the running mean, after the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, trained with training.power_ema.")],
    width: Annotated[float, typer.Option("--width", help="Relative width σ_rel of the mean, above 0 and below 0.28.")],
    step: Annotated[int | None, typer.Option("--step", help="When the mean is taken; the last snapshot's.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--output_dir", help="The model folder; RUN/model-power-WIDTH unless said.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a model of another mean of a run's weights, without training again (EDM2's post-hoc EMA).

    The run must have kept snapshots: --set training.power_ema=[0.05,0.1]. Measure several widths with carrara
    evaluate and keep the best: the mean that samples best is rarely the one that was guessed beforehand.
    """
    import json

    from carrara.training.posthoc import reweighted

    folder = out or run / f"model-power-{width:g}"
    model = reweighted(run, width, step)
    model.save(folder)
    if json_output:
        print(json.dumps({"folder": str(folder), "width": width, "origin": model.origin}))
    else:
        print(f"{model.origin}\nmodel: {folder}")
