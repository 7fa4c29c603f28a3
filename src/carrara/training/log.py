"""The log of a run: `log.jsonl` always, and a tracker in addition."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from torch import Tensor

from carrara.errors import UserError
from carrara.files import write_whole
from carrara.recipe import Recipe
from carrara.training.run import flat


class Tracker(Protocol):
    """Where numbers and pictures go in addition to `log.jsonl`."""

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Add the numbers of one step."""
        ...

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Add a picture, float [C, H, W] in [0, 1]."""
        ...

    def close(self) -> None:
        """Write out what is still in memory."""
        ...


class TensorBoard:
    """TensorBoard's event files in `tensorboard/`; what a killed run wrote behind the step is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self._board.add_image(name, image, step)

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run on Weights & Biases, named after the run folder and resumed with it.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise UserError(
                "training.tracker=wandb needs the package wandb: install it, or use tensorboard or none.",
                key="training.tracker",
                code="missing",
            ) from None
        self._wandb: Any = wandb
        name = folder.resolve().name
        self._run: Any = wandb.init(
            project="carrara",
            name=name,
            id=name,
            resume="allow",
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
        )

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self._run.log({name: self._wandb.Image(image.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        self._run.finish()


class Log:
    """`log.jsonl`, one line for each interval, `skipped.jsonl`, one for each step that was not finite, a tracker.

    Opening it at a step removes what a killed run wrote behind that step, so that the log of an interrupted run
    is the log of an uninterrupted one (`timing` aside).

    Raises:
        UserError: from every method that writes, when the disk is full.
    """

    def __init__(self, folder: Path, step: int, recipe: Recipe) -> None:
        self.tracker: Tracker | None = None
        if recipe.training.tracker == "tensorboard":
            self.tracker = TensorBoard(folder, step)
        elif recipe.training.tracker == "wandb":
            self.tracker = WeightsAndBiases(folder, recipe)
        self._skipped = folder / "skipped.jsonl"
        for path, last in ((folder / "log.jsonl", step), (self._skipped, step - 1)):
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
                write_whole(path, "".join(line + "\n" for line in kept).encode())
        self._file: IO[str] = open(folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (held as long as the run)

    def write(self, entry: dict[str, Any]) -> None:
        """Add the entry of one step; numbers go to the tracker under their keys."""
        with self._writing():
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            if self.tracker is not None:
                numbers = {k: float(v) for k, v in flat(entry).items() if isinstance(v, (int, float)) and k != "step"}
                self.tracker.numbers(numbers, entry["step"])

    def skipped(self, entry: dict[str, Any]) -> None:
        """Log a step that was not taken."""
        with self._writing(), open(self._skipped, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Add a picture, float [C, H, W] in [-1, 1], to the tracker."""
        if self.tracker is not None:
            with self._writing():
                self.tracker.picture(name, ((image + 1) / 2).clamp(0, 1), step)

    def close(self) -> None:
        """Write out what is still in memory."""
        # A line that found no room was reported when it was written; it is written again on resume.
        with contextlib.suppress(OSError):
            self._file.close()
        if self.tracker is not None:
            with contextlib.suppress(OSError):
                self.tracker.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the log {self._file.name} could not be written ({error.strerror or error}): free some space and run "
                "the same command again, it goes on from the newest whole checkpoint.",
                key=str(self._file.name),
                code="resources",
            ) from None
