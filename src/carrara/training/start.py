"""Beginning from the weights of another model: fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from carrara.errors import UserError
from carrara.recipe import Recipe

Network = TypeVar("Network", bound=nn.Module)


def begun_from(
    base: Network, recipe: Recipe, classes: int | None, shape: tuple[int, int, int]
) -> tuple[Network, list[str]]:
    """A network with the weights of another, for other images or classes.

    Weights of the same shape are taken over. A table of classes keeps its rows where a null label is added behind
    them, and starts anew where the number of classes is another one.

    Args:
        base: a network whose `params` say its shape.
        recipe: may change `network.dropout` and `network.checkpointing`.
        classes: of the data, or None for a model that is told nothing.
        shape: [C, H, W] of the images, or of their latents, that it is for.

    Returns:
        The network, and the names of the weights that start anew.

    Raises:
        UserError: the network takes another number of channels.
    """
    params: Any = base.params
    channels, *size = shape
    if params.in_channels != channels:
        raise UserError(
            f"{recipe.start} makes images of {params.in_channels} channels, the data have {channels}: "
            f"set data.channels={params.in_channels}."
        )
    changes: dict[str, Any] = {"image_size": tuple(size), "num_classes": classes, **recipe.network}
    if recipe.kind == "diffusion":
        changes["null_label"] = classes is not None and recipe.conditioning.dropout > 0
    torch.manual_seed(recipe.seed)
    network = type(base)(replace(params, **changes))
    old, new = base.state_dict(), network.state_dict()
    anew = []
    for name, weight in new.items():
        if name in old and old[name].shape == weight.shape:
            weight.copy_(old[name])
        elif name == "label.weight" and name in old and params.num_classes == classes:
            known = min(len(weight), len(old[name]))
            weight[:known] = old[name][:known]
        else:
            anew.append(name)
    return network, anew


def begun_sentence(start: str, anew: list[str]) -> str:
    """Where a run starts from, for its summary."""
    return start + (f" ({', '.join(anew)} anew)" if anew else "")
