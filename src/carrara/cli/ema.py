"""`carrara ema`: another width of the running mean, after the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, trained with training.power_ema.")],
    width: Annotated[float, typer.Option("--width", help="Relative width σ_rel of the mean, above 0 and below 0.28.")],
    step: Annotated[
        int | None, typer.Option("--step", help="When the mean is taken; default: the last snapshot.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--output_dir", help="The model folder; default: RUN/model-power-WIDTH.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a model of another mean of a run's weights, without training again (EDM2's post-hoc EMA).

    The run must have kept snapshots: --set training.power_ema=[0.05,0.1]. Measure several widths with carrara
    evaluate and keep the best.
    """
    import json

    from carrara.app.ema import EmaRequest
    from carrara.app.ema import ema as events
    from carrara.app.events import Saved
    from carrara.cli.console import console, show

    for event in show(events(EmaRequest(run=run, width=width, step=step, out=out)), json_output):
        if isinstance(event, Saved) and json_output:
            print(json.dumps({"folder": str(event.path), **event.about}))
        elif isinstance(event, Saved):
            console.print(f"{event.about['origin']}\nmodel: {event.path}")
