"""Beginning from the weights of another model: fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from carrara.errors import UserError
from carrara.recipe import Recipe

Network = TypeVar("Network", bound=nn.Module)


def begun_from(base: Network, recipe: Recipe, classes: int | None) -> tuple[Network, list[str]]:
    """A network with the weights of another, for other images or classes.

    Weights of the same shape are taken over. A table of classes keeps its rows where a null label is added behind
    them, and starts anew where the number of classes is another one.

    Args:
        base: a network whose `params` say its shape.
        recipe: says the images, and may change `network.dropout` and `network.checkpointing`.
        classes: of the data, or None for a model that is told nothing.

    Returns:
        The network, and the names of the weights that start anew.

    Raises:
        UserError: the network takes another number of channels, or something beside images and classes.
    """
    params: Any = base.params
    data = recipe.data
    if params.in_channels != data.channels:
        raise UserError(
            f"{recipe.start} makes images of {params.in_channels} channels, the data have {data.channels}: "
            f"set data.channels={params.in_channels}."
        )
    if getattr(params, "concat_channels", 0):
        raise UserError(f"{recipe.start} is an up-sampler, which is not trained from a folder of images.")
    changes: dict[str, Any] = {"image_size": data.resolution, "num_classes": classes, **recipe.network}
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
