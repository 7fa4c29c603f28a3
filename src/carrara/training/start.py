"""Starting from the weights of another model: fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from carrara import networks
from carrara.errors import UserError
from carrara.recipe import DiffusionRecipe, NetworkRecipe

TABLE = "label.weight"
"""The rows of the classes."""


def network_from(
    base: nn.Module,
    recipe: NetworkRecipe,
    classes: int | None,
    shape: tuple[int, ...],
    names: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> tuple[networks.Network, list[str]]:
    """A network with the weights of another, for other images or classes.

    Weights of the same shape are copied. The rows of a table of classes are copied by the classes' names, the null
    label's to the null label; of classes that the other network does not know they are random.

    Args:
        base: a registered network.
        recipe: may change `network.dropout` and `network.checkpointing`.
        classes: of the data, or None for an unconditional model.
        shape: [C, H, W] of the images, or of their latents, that it is for.
        names: of the other network's classes, and of the data's.

    Returns:
        The network, and the names of the weights that are random.

    Raises:
        UserError: the network takes another number of channels.
    """
    config = networks.config(base)
    channels, *size = shape
    expected = config.get("in_channels", channels)
    if expected != channels:
        raise UserError(
            f"{recipe.start} makes images of {expected} channels, the data have {channels}: "
            f"set data.channels={expected}.",
            key="data.channels",
            code="mismatch",
        )
    changes: dict[str, Any] = {"image_size": tuple(size), "num_classes": classes, **recipe.network.given()}
    if isinstance(recipe, DiffusionRecipe):
        changes["null_label"] = classes is not None and recipe.conditioning.dropout > 0
    torch.manual_seed(recipe.seed)
    network = networks.build(config | {key: value for key, value in changes.items() if key in config})
    old, new = base.state_dict(), network.state_dict()
    random = []
    for name, weight in new.items():
        if name == TABLE and name in old and old[name].shape[1:] == weight.shape[1:]:
            rows = _rows(*names, config.get("num_classes"), classes, len(old[name]), len(weight))
            for row, known in rows.items():
                weight[row] = old[name][known]
            random += [f"{name}[{row}]" for row in range(len(weight)) if row not in rows and row != classes]
        elif name in old and old[name].shape == weight.shape:
            weight.copy_(old[name])
        else:
            random.append(name)
    return network, random


def _rows(
    old: Sequence[str], new: Sequence[str], old_count: int | None, count: int | None, old_rows: int, rows: int
) -> dict[int, int]:
    """Which row of the old table each row of the new one is copied from."""
    numbers = list(map(str, range(old_count or 0)))
    if list(old) in ([], numbers):  # classes without names are their numbers
        old, new = numbers, numbers if count == old_count else []
    places = {name: place for place, name in enumerate(old)}
    found = {place: places[name] for place, name in enumerate(new) if name in places}
    if old_count is not None and count is not None and old_rows > old_count and rows > count:
        found[count] = old_count
    return found


def start_sentence(start: str, random: list[str]) -> str:
    """Where a run starts from, for its summary."""
    return start + (f" ({', '.join(random)} random)" if random else "")
