"""One run is one folder. It holds its recipe, belongs to one process at a time, and keeps its log.

runs/NAME/  recipe.yaml  model/  checkpoints/  log.jsonl  tensorboard/  samples/
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from carrara.errors import UserError
from carrara.files import write_whole
from carrara.recipe import Recipe, validate

_HARMLESS = {
    "data.workers",
    "training.log_every",
    "training.checkpoint_every",
    "training.sample_every",
    "training.keep_checkpoints",
    "name",
}


class Run:
    """A run folder, claimed for this process.

    Args:
        folder: where it lies; made where it does not exist.
        recipe: what is to be trained in it.
        accept_changes: go on although the folder's recipe differs in what changes the result.

    Raises:
        UserError: the folder holds something else, another recipe's run, or a run that is under way.
    """

    def __init__(self, folder: Path, recipe: Recipe, accept_changes: bool = False) -> None:
        self.folder, self.recipe = folder, recipe
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder for the run.")
        known = folder / "recipe.yaml"
        if folder.is_dir() and not known.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} holds other files and no run: name an empty or a new folder with --out.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be made ({error.strerror}).") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"another process is training in {folder}: wait for it, or name another --out.") from None
        try:
            if known.exists():
                self._compare(known, accept_changes)
            write_whole(known, recipe.to_yaml().encode())
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        """The folder of the finished model."""
        return self.folder / "model"

    @property
    def samples(self) -> Path:
        """The folder of the previews."""
        return self.folder / "samples"

    def _compare(self, known: Path, accept_changes: bool) -> None:
        try:
            before = validate(yaml.safe_load(known.read_text(encoding="utf-8")), f"the recipe {known}")
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{known} is damaged ({error}): name another --out, or remove the folder.") from None
        changes = differences(before, self.recipe)
        telling = [line for key, line in changes.items() if key not in _HARMLESS and not self._extends(key)]
        if telling and not accept_changes:
            raise UserError(
                f"{self.folder} holds a run of another recipe, which differs in {'; '.join(telling)}: "
                "name another --out, or pass --accept-changes to go on with this one."
            )

    def _extends(self, key: str) -> bool:
        """More steps change nothing of the steps before, unless the learning rate counts towards the last."""
        return key == "training.steps" and self.recipe.training.decay != "cosine"


def differences(before: Recipe, after: Recipe) -> dict[str, str]:
    """What differs between two recipes: by key, a readable "key: old → new"."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    keys = sorted(old.keys() | new.keys())
    return {key: f"{key}: {old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


class Log:
    """`log.jsonl`, one line for each interval, and TensorBoard beside it.

    Opening it at a step removes what a killed run wrote behind that step, so that the log of an interrupted run
    is the log of an uninterrupted one (`timing` aside).
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "log.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_whole(path, "".join(line + "\n" for line in kept).encode())
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        """Add the entry of one step; numbers go to TensorBoard under their keys."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        for key, value in _flat(entry).items():
            if isinstance(value, (int, float)) and key != "step":
                self._board.add_scalar(key, value, entry["step"])

    def picture(self, name: str, image: Any, step: int) -> None:
        """Add a picture, float [C, H, W] in [-1, 1], to TensorBoard."""
        self._board.add_image(name, ((image + 1) / 2).clamp(0, 1), step)

    def close(self) -> None:
        """Write out what is still in memory."""
        self._file.close()
        self._board.close()
