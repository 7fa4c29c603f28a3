"""What a checkpoint holds, taken from a trainer's parts and put back into them; the same for one process, DDP and
FSDP, so that each goes on from the others' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from carrara.distributed import shard_like, whole


def copied(value: Any, place: Any = None) -> Any:
    """Plain data with its tensors whole and copied to the CPU: a state that training cannot change any more.

    Args:
        place: an earlier copy that nobody needs any more; where it fits, its memory is used again. The kernel takes
            several times as long to give out fresh memory as it takes to copy into it.
    """
    if isinstance(value, Tensor):
        there = whole(value.detach())
        if isinstance(place, Tensor) and (place.shape, place.dtype) == (there.shape, there.dtype):
            return place.copy_(there)
        # Contiguous copies: what lies in another order in memory (channels last) is written alike.
        return there.to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        before = place if isinstance(place, Mapping) else {}
        return {key: copied(item, before.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value


def split(tree: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """The tensors of nested data by their paths ("weights/ema/out.bias"), and the data without them; single numbers
    stay in the data. `join` is its inverse."""
    tensors: dict[str, Tensor] = {}
    rest: dict[Any, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor) and value.ndim:
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            inner, rest[key] = split(value, f"{prefix}{key}/")
            tensors |= inner
        else:
            rest[key] = value
    return tensors, rest


def join(tensors: Mapping[str, Tensor], rest: dict[Any, Any]) -> None:
    """Put tensors back into the data that they were split from, in place."""
    for path, values in tensors.items():
        *places, name = path.split("/")
        node = rest
        for place in places:  # an optimiser numbers its parameters
            node = node[place if place in node else int(place)]
        node[name] = values


def pattern(modules: Mapping[str, nn.Module], optimisers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """How the tensors of a checkpoint lie on this process, by their paths; both moments lie as their parameter."""
    moments = {
        name: {"state": dict(enumerate({"exp_avg": p, "exp_avg_sq": p} for g in o.param_groups for p in g["params"]))}
        for name, o in optimisers.items()
    }
    weights = {name: module.state_dict() for name, module in modules.items()}
    return split({"weights": weights, "optimisers": moments})[0]


def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a module, sharded or not, from whole weights.

    Raises:
        RuntimeError: they do not fit.
    """
    own = module.state_dict()
    module.load_state_dict({k: shard_like(own[k], v) if k in own else v for k, v in weights.items()})


def put_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Fill an optimiser, of sharded parameters or not, from its whole state.

    Raises:
        ValueError, KeyError: it does not fit.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]

    def placed(parameter: Tensor, value: Any) -> Any:
        same = isinstance(value, Tensor) and value.shape == parameter.shape
        return shard_like(parameter, value) if same else value

    entries = {
        index: {key: placed(parameters[index], value) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": entries})
