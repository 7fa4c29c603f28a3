"""One run is one folder. It holds its recipe and belongs to one training at a time.

runs/NAME/  recipe.yaml  model/  checkpoints/  snapshots/  log.jsonl  skipped.jsonl  tensorboard/  samples/
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from carrara.errors import UserError
from carrara.files import locked, write_whole
from carrara.recipe import Recipe, validate

_HARMLESS = {
    "name",
    "data.about",
    "data.workers",
    "data.cache",
    "training.micro_batch",
    "training.parallel",
    "training.compile",
    "training.log_every",
    "training.checkpoint_every",
    "training.sample_every",
    "training.validate_every",
    "training.validation_split",
    "training.validation_images",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.tracker",
    "training.stuck_after",
}
"""What may differ on resume: the result is the same up to the rounding of sums."""


class Run:
    """A run folder.

    Args:
        folder: where it lies.
        recipe: what is to be trained in it.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self._lock = ExitStack()

    def claim(self, accept_changes: bool = False) -> None:
        """Make the folder and hold it for this process.

        Args:
            accept_changes: resume although the folder's recipe differs in what changes the result.

        Raises:
            UserError: the folder holds something else, another recipe's run, or a run that is under way.
        """
        folder, known = self.folder, self.folder / "recipe.yaml"
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder for the run.", key="out", code="exists")
        if folder.is_dir() and not known.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(
                f"{folder} holds other files and no run: name an empty or a new folder with --out.",
                key="out",
                code="exists",
            )
        busy = f"another process is training in {folder}: wait for it, or name another --out."
        self._lock.enter_context(locked(folder, busy))
        try:
            if known.exists():
                self._compare(known, accept_changes)
        except UserError:
            self.close()
            raise

    def write_recipe(self) -> None:
        """Write the recipe, once nothing about the run can be refused any more."""
        write_whole(self.folder / "recipe.yaml", self.recipe.to_yaml().encode())

    def close(self) -> None:
        """Release the folder for other processes."""
        self._lock.close()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """The folder of the power-function means, for re-weighting."""
        return self.folder / "snapshots"

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
            raise UserError(
                f"{known} is damaged ({error}): name another --out, or remove the folder.",
                key=str(known),
                code="damaged",
            ) from None
        changes = differences(before, self.recipe)
        relevant = [line for key, line in changes.items() if key not in _HARMLESS and not self._extends(key)]
        if relevant and not accept_changes:
            raise UserError(
                f"{self.folder} holds a run of another recipe, which differs in {'; '.join(relevant)}: "
                "name another --out, or pass --accept-changes to go on with this one.",
                key="accept_changes",
                code="mismatch",
            )

    def _extends(self, key: str) -> bool:
        """More steps change nothing of the steps before, unless the learning rate counts towards the last."""
        return key == "training.steps" and self.recipe.training.decay != "cosine"


def differences(before: Recipe, after: Recipe) -> dict[str, str]:
    """What differs between two recipes: by key, a readable "key: old → new"."""
    old, new = flat(before.model_dump(mode="json")), flat(after.model_dump(mode="json"))
    keys = sorted(old.keys() | new.keys())
    return {key: f"{key}: {old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)}


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data with joined keys: {"a": {"b": 1}} as {"a.b": 1}."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result
