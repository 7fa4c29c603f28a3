"""Another width of the running mean, after the training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from carrara.app.events import Event, Saved
from carrara.app.request import Request, check_folder


class EmaRequest(Request):
    """What `ema` makes.

    Attributes:
        run: a run folder whose recipe had training.power_ema.
        width: relative width σ_rel of the mean, above 0 and below 0.28.
        step: when the mean is taken; None is the last snapshot.
        out: the model folder; None is RUN/model-power-WIDTH.
    """

    run: Path
    width: float
    step: int | None = None
    out: Path | None = None


def ema(request: EmaRequest) -> Iterator[Event]:
    """Make a model of another mean of a run's weights (Karras et al. 2023, §3.2).

    Raises:
        UserError: the run stored no such means, or the folder cannot be written.
    """
    from carrara.training.posthoc import reweighted

    folder = request.out or request.run / f"model-power-{request.width:g}"
    check_folder(folder, "out")
    model = reweighted(request.run, request.width, request.step)
    model.save(folder)
    yield Saved("model", folder, {"width": request.width, "origin": model.origin})
