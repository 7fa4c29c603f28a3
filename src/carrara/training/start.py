"""Beginning from the weights of another model: fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from carrara import networks
from carrara.errors import UserError
from carrara.recipe import Recipe


def begun_from(
    base: nn.Module, recipe: Recipe, classes: int | None, shape: tuple[int, ...]
) -> tuple[networks.Network, list[str]]:
    """A network with the weights of another, for other images or classes.

    Weights of the same shape are taken over. A table of classes keeps its rows where a null label is added behind
    them, and starts anew where the number of classes is another one.

    Args:
        base: a registered network.
        recipe: may change `network.dropout` and `network.checkpointing`.
        classes: of the data, or None for a model that is told nothing.
        shape: [C, H, W] of the images, or of their latents, that it is for.

    Returns:
        The network, and the names of the weights that start anew.

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
    changes: dict[str, Any] = {"image_size": tuple(size), "num_classes": classes, **recipe.network}
    if recipe.kind == "diffusion":
        changes["null_label"] = classes is not None and recipe.conditioning.dropout > 0
    torch.manual_seed(recipe.seed)
    network = networks.build(config | {key: value for key, value in changes.items() if key in config})
    old, new = base.state_dict(), network.state_dict()
    anew = []
    for name, weight in new.items():
        if name in old and old[name].shape == weight.shape:
            weight.copy_(old[name])
        elif name == "label.weight" and name in old and config["num_classes"] == classes:
            known = min(len(weight), len(old[name]))
            weight[:known] = old[name][:known]
        else:
            anew.append(name)
    return network, anew


def begun_sentence(start: str, anew: list[str]) -> str:
    """Where a run starts from, for its summary."""
    return start + (f" ({', '.join(anew)} anew)" if anew else "")
