"""Mapping state dicts key by key, without loss: a layout is a table of names, one row for each part of a module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from carrara.errors import UserError

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """One of our tensors and where it lies in another program's state dict.

    Attributes:
        mine: our key.
        theirs: their keys; several are joined along the first axis to make ours.
        axes: how many axes theirs has where that is another number than ours, those beyond the second of size 1 (a
            matrix of tokens is a 1×1 convolution of the map); 0 is as many as ours.
    """

    mine: str
    theirs: tuple[str, ...]
    axes: int = 0

    def shape(self, mine: Tensor) -> tuple[int, ...]:
        """The shape of each of theirs."""
        size = tuple(mine.shape)
        if len(self.theirs) > 1:
            size = (size[0] // len(self.theirs), *size[1:])
        return (*size[:2], *[1] * (self.axes - 2)) if self.axes else size


Table = dict[type[nn.Module], Mapping[str, str | tuple[str, int]]]
"""Of each type of module: our names of its parts, and theirs.

`{i}` and `{j}` stand for numbers, `{-i}` for a number that counts from the other end. Several names of theirs, divided
by a space, are joined to one of ours. The number is `Place.axes` of the weight. Parts that a module does not have are
passed over; parts whose type is in the table are looked up in it, others have the same names inside.
"""


def places(network: nn.Module, table: Table, mine: str = "", theirs: str = "") -> Iterator[Place]:
    """Where the tensors of a network lie in another program's state dict.

    Args:
        network: holds them.
        table: the names.
        mine, theirs: begin with this module of ours, and its name there.
    """
    module = network.get_submodule(mine)
    modules = dict(module.named_modules())
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for part, other in _parts(table, module).items():
        names, axes = (other, 0) if isinstance(other, str) else other
        if part in tensors:
            yield Place(_join(mine, part), (_join(theirs, names),))
        pattern = re.compile(re.sub(r"\\{([a-z])\\}", r"(?P<\1>\\d+)", re.escape(part)))
        for name in filter(None, modules):
            if (match := pattern.fullmatch(name)) is None:
                continue
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            for key, number in list(numbers.items()):
                siblings = modules[name[: match.start(key) - 1]]
                numbers[f"-{key}"] = len(list(siblings.children())) - 1 - number
            keys = tuple(_join(theirs, each.format_map(numbers)) for each in names.split())
            if _parts(table, modules[name]):
                yield from places(network, table, _join(mine, name), keys[0])
                continue
            for tensor in dict(modules[name].named_parameters()) | dict(modules[name].named_buffers()):
                inner = tuple(_join(key, tensor) for key in keys)
                yield Place(_join(mine, name, tensor), inner, axes if tensor == "weight" else 0)


def _parts(table: Table, module: nn.Module) -> Mapping[str, str | tuple[str, int]]:
    return next((table[kind] for kind in type(module).__mro__ if kind in table), {})


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


WRAPPERS = ("module", "_orig_mod")
"""What data parallel training and `torch.compile` insert into the names of the modules that they wrap."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types that weights may have."""


def strip_prefixes(checkpoint: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The same tensors without the names of wrappers, wherever they are in a key, and without `prefixes`.

    A prefix that only some keys have marks the part that is wanted: the other keys are dropped.

    Raises:
        UserError: two keys differ by the names of wrappers only.
    """
    stripped: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        plain = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if plain in stripped:
            raise UserError(
                f"the checkpoint contains '{plain}' twice, with and without the name of a wrapper.",
                key=key,
                code="conflict",
            )
        stripped[plain] = value
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in stripped):
            stripped = {k.removeprefix(prefix): v for k, v in stripped.items() if k.startswith(prefix)}
    return stripped


def check_tensor(key: str, value: Tensor) -> None:
    """Raises UserError unless a tensor is of a floating-point type and finite in float32."""
    if value.dtype not in FLOATS:
        raise UserError(
            f"'{key}' is of type {str(value.dtype).removeprefix('torch.')}: weights in float32, "
            "float16 or bfloat16 are expected, not quantised ones.",
            key=key,
            code="unsupported",
        )
    if not bool(value.float().isfinite().all()):
        raise UserError(
            f"'{key}' contains NaN or infinite values: its training diverged, or the file is damaged.",
            key=key,
            code="damaged",
        )


def to_ours(checkpoint: Mapping[str, Tensor], network: nn.Module, places: Iterable[Place]) -> dict[str, Tensor]:
    """A checkpoint under our names, every key of it used; of the network only shapes and types are read.

    Raises:
        UserError: a key is missing, unexpected, of another shape, quantised or not finite; the first one is named.
    """
    own = network.state_dict()
    ours: dict[str, Tensor] = {}
    known = set()
    for place in places:
        known |= set(place.theirs)
        shape = place.shape(own[place.mine])
        for key in place.theirs:
            if key not in checkpoint:
                raise UserError(
                    f"the checkpoint lacks '{key}', which a network of these arguments has.", key=key, code="missing"
                )
            if tuple(checkpoint[key].shape) != shape:
                raise UserError(
                    f"the checkpoint's '{key}' has the shape {tuple(checkpoint[key].shape)}, "
                    f"a network of these arguments {shape}.",
                    key=key,
                    code="shape",
                )
            if own[place.mine].is_floating_point():
                check_tensor(key, checkpoint[key])
        joined = torch.cat([checkpoint[key] for key in place.theirs]) if len(place.theirs) > 1 else checkpoint[key]
        ours[place.mine] = joined.reshape(own[place.mine].shape)
    for key in checkpoint:
        if key not in known:
            raise UserError(
                f"the checkpoint contains '{key}', which a network of these arguments does not have.",
                key=key,
                code="unknown",
            )
    return ours


def to_theirs(network: nn.Module, places: Iterable[Place]) -> dict[str, Tensor]:
    """The network's weights under the others' keys (the network may be on the meta device).

    Raises:
        UserError: weights that are not finite.
    """
    own = network.state_dict()
    theirs = {}
    for place in places:
        mine, count = own[place.mine], len(place.theirs)
        if not mine.is_meta and mine.is_floating_point():
            check_tensor(place.mine, mine)
        for key, part in zip(place.theirs, mine.chunk(count) if count > 1 else (mine,), strict=True):
            theirs[key] = part.reshape(place.shape(mine))
    return theirs


def filled(
    make: Callable[[], AnyModule],
    checkpoint: Mapping[str, Tensor],
    places_of: Callable[[AnyModule], Iterable[Place]],
) -> AnyModule:
    """A module with the weights of a checkpoint, in float32 and in eval mode.

    Args:
        make: makes the module, whose buffers are all in its state; its random start is not drawn.
        checkpoint: the weights under the others' keys.
        places_of: where its tensors lie there; buffers that lie nowhere are statistics, which start again.

    Raises:
        UserError: see `to_ours`.
    """
    with torch.device("meta"):
        module = make()
    ours = to_ours(checkpoint, module, places_of(module))
    module.to_empty(device="cpu")
    for name, buffer in module.named_buffers():
        buffer.fill_(1 if name == "latent_scale" else 0)
    missing = module.load_state_dict(ours, strict=False).missing_keys
    assert not missing or not dict(module.named_parameters()).keys() & missing
    return module.eval()


def shapes(checkpoint: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor."""
    return {key: tuple(value.shape) for key, value in checkpoint.items()}


def difference(found: Shapes, expected: Shapes) -> str:
    """The first key that a file and a network do not share, with both shapes."""
    key = first_difference(found, expected)
    return f"'{key}' is {found.get(key, 'absent')} in the file and {expected.get(key, 'absent')} in the model"


def first_difference(found: Shapes, expected: Shapes) -> str:
    """The first key that two networks do not share, or whose shapes differ."""
    return next(key for key in (*expected, *found) if expected.get(key) != found.get(key))


def check_expressible(program: str, unknown: Iterable[tuple[str, bool, str]]) -> None:
    """Raises UserError unless a program knows everything that a module has.

    Args:
        program: whose layout it is.
        unknown: (the entry of the config, whether the program lacks it, what it lacks) in the order of checking.
    """
    for key, lacking, what in unknown:
        if lacking:
            raise UserError(
                f"{program} has no {what}, so this cannot be written in its layout.", key=key, code="unsupported"
            )
