"""Everything of a model but its weights: written with them where another program's layout has no place for it, and read
back, so that a model that is exported and imported again is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from carrara import conditioning, networks
from carrara.classifier import Classifier
from carrara.entries import read_entries, typed
from carrara.errors import UserError
from carrara.model import CONFIG, DiffusionModel, conditioner_configs
from carrara.networks import Network
from carrara.process import Predicts, schedules

KEY = "carrara"
"""The entry of a config, and the name of the file of a folder, that has it."""

Record = Mapping[str, Any]


def record(model: DiffusionModel | Classifier) -> dict[str, Any]:
    """Everything of a model but weights and codec, as plain data."""
    if isinstance(model, Classifier):
        schedule, names = model.schedule.spec, list(model.names)
        return {"network": networks.config(model.network), "schedule": schedule, "names": names, "noisy": model.noisy}
    return {key: value for key, value in model.config().items() if key not in ("codec", "origin")}


def network(record: Record, path: Path) -> Network:
    """The recorded network without weights (on the meta device).

    Raises:
        UserError: the record is damaged.
    """
    try:
        with torch.device("meta"):
            return networks.build(record["network"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None


def restore(model: DiffusionModel | Classifier, record: Record, path: Path, *, weights_only: bool = False) -> None:
    """Give a model that was read from another layout what the record has in addition.

    Args:
        model: changed in place.
        record: what `record` returned when it was written.
        path: where it was read, for sentences.
        weights_only: the layout itself has no place for schedule, prediction and class names; where it has, its own
            are kept, as somebody may have changed them.

    Raises:
        UserError: the record is damaged.
    """
    try:
        if isinstance(model, DiffusionModel):
            _restore_sampling(model, record, weights_only)
        if not weights_only:
            return
        model.schedule = schedules.build(record["schedule"])
        if isinstance(model, Classifier):
            model.names, model.noisy = tuple(record["names"]), bool(record["noisy"])
            if len(model.names) != model.network.params.num_classes:
                raise ValueError("another number of classes")
            return
        model.predicts = typed(record["predicts"], Predicts, "predicts")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None


def _restore_sampling(model: DiffusionModel, record: Record, weights_only: bool) -> None:
    stored = {name: entry for name, entry in CONFIG.items() if name in ("levels", "sampling", "shape", "sigma_data")}
    for name, value in read_entries(record, stored, KEY, others=True).items():
        setattr(model, name, value)
    own = model.class_labels
    model.conditioners = tuple(conditioning.build(entry) for entry in conditioner_configs(dict(record)))
    recorded = model.class_labels
    if not weights_only and own is not None and recorded is not None and own.names != recorded.names:
        model.conditioners = (own,)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).rstrip(".") if isinstance(error, UserError) else f"{error!r} is wrong or missing"
    return UserError(
        f"{path} does not describe a model ({reason}): export it again, or delete the file.",
        key=str(path),
        code="damaged",
    )
