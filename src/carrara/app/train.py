"""Training a recipe or a folder of images, and the self-tests of a recipe."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from carrara.app.events import Event, Metrics, Notice, Saved, StepDone
from carrara.app.request import Request
from carrara.errors import UserError

if TYPE_CHECKING:
    from carrara.recipe import Recipe
    from carrara.training import Trainer
    from carrara.training.progress import Progress

_LOSS_EVERY = 1.0
"""Seconds between two losses that are shown in addition to the logged ones."""


class TrainRequest(Request):
    """What to train, and where.

    Attributes:
        what: a shipped recipe, a YAML file, or a folder (or file) of images.
        out: the run folder; None is runs/NAME. A run that is there is resumed.
        changes: `section.key=value` assignments to the recipe, later ones winning.
        accept_changes: resume although the folder's recipe or the data changed.
        device: "auto" or a device.
        precision: "auto", fp32, bf16 or fp16; None leaves the recipe's.
    """

    what: str
    out: Path | None = None
    changes: tuple[str, ...] = ()
    accept_changes: bool = False
    device: str = "auto"
    precision: str | None = None


class SelfTestRequest(TrainRequest):
    """Which self-tests of a recipe to run, in a folder that is removed afterwards.

    Attributes:
        overfit_one_batch: whether it can learn one batch by heart.
        profile: where the time of a step goes.
    """

    overfit_one_batch: bool = False
    profile: bool = False


def train(request: TrainRequest) -> Iterator[Event]:
    """Train to the last step, or until a signal: then everything is saved.

    Yields:
        `Metrics` "start" with every effective number, the steps, `Metrics` "log" at the log's intervals, and at the
        end the `Saved` model, or after a signal the `Saved` checkpoint.

    Raises:
        UserError: recipe, data, folder and device do not fit together, before anything is trained.
    """
    from carrara import distributed
    from carrara.training import Trainer

    recipe, reasons = _recipe(request)
    trainer = Trainer(recipe, request.out or Path("runs") / recipe.name, request.accept_changes, request.device)
    try:
        yield from training(trainer, reasons)
    finally:
        distributed.finish()


def training(trainer: Trainer, reasons: list[str]) -> Iterator[Event]:
    """The events of a trainer; of several processes the first reports, and the others what only they have met."""
    if not trainer.processes.first:
        for state in trainer.steps():
            if state.notice and state.notice not in trainer.notices:
                yield Notice(f"process {trainer.processes.rank}: {state.notice}")
        return
    about = {"start": trainer.summary(), "reasons": reasons, "run": str(trainer.run.folder)}
    yield Metrics("start", about)
    every, loss, shown = trainer.recipe.training.log_every, 0.0, float("-inf")
    for state in trainer.steps():
        if state.notice:
            yield Notice(state.notice)
            continue
        logged = state.step % every == 0 or state.step == state.total
        if logged or time.monotonic() - shown > _LOSS_EVERY:  # reading a loss waits for the device
            loss, shown = state.loss, time.monotonic()
        yield _step(state, loss)
        if logged:
            values = {"loss": loss, "images_per_s": state.images_per_s, "seconds_left": state.seconds_left}
            finite = {name: value for name, value in values.items() if value == value}
            yield Metrics("log", {"step": state.step, "total": state.total, **finite})
    if trainer.stopped:
        yield Saved("checkpoint", trainer.run.checkpoints, {"stopped": trainer.step})
    else:
        yield Saved("model", trainer.run.model)


def self_test(request: SelfTestRequest) -> Iterator[Event]:
    """Run the self-tests; each ends with its `Metrics`."""
    from carrara.training import Trainer
    from carrara.training.selftest import GOAL, overfit_one_batch, profile_steps

    recipe, _ = _recipe(request)
    with tempfile.TemporaryDirectory() as folder:
        if request.profile:
            profile = profile_steps(Trainer(recipe, Path(folder) / "profile", device=request.device))
            yield Metrics("profile", profile)
        if request.overfit_one_batch:
            for step, fraction in overfit_one_batch(Trainer(recipe, Path(folder) / "overfit", device=request.device)):
                yield StepDone("learning one batch", step, 0, f"loss at {fraction:.1%} of its start")
            yield Metrics("overfit", {"steps": step, "loss_share": fraction, "passed": fraction <= GOAL})


def _step(state: Progress, loss: float) -> StepDone:
    note = f"loss {loss:.4f}  {state.images_per_s:,.0f} images/s  {_duration(state.seconds_left)} left"
    return StepDone("training", state.step, state.total, note)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _recipe(request: TrainRequest) -> tuple[Recipe, list[str]]:
    """The recipe with its changes, and why it was chosen where it was made for a folder."""
    from carrara.devices import resolve_device, resolve_precision
    from carrara.recipe import override, read, shipped, validate
    from carrara.training.choose import recipe_for

    what, path, reasons = request.what, Path(request.what), list[str]()
    device, changes = resolve_device(request.device), list(request.changes)
    if request.precision is not None:
        changes.append(f"training.precision={resolve_precision(request.precision, device)}")
    if what in shipped() or path.suffix in (".yaml", ".yml"):
        data = read(what)
    elif path.exists():
        data, reasons = recipe_for(path, changes)
    else:
        raise UserError(
            f"{what} is neither a shipped recipe ({', '.join(shipped())}), nor a recipe file, nor a folder.",
            key=what,
            code="missing",
        )
    recipe = validate(override(data, changes), f"the recipe {what}")
    resolve_precision(recipe.training.precision, device)
    return recipe, reasons
