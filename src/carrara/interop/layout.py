"""Mapping state dicts key by key, without loss, where layers of others lie joined in ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carrara.errors import UserError


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


def leaf(network: nn.Module, mine: str, *theirs: str, matrix: bool = False, axes: int = 0) -> Iterator[Place]:
    """The places of a layer's own parameters and buffers; none for a layer that holds nothing.

    Args:
        network: holds the layer.
        mine: the layer's name.
        theirs: the names of theirs, of which ours is joined.
        matrix: their weight is a matrix where ours is a 1×1 convolution.
        axes: see `Place`, of the weight.
    """
    layer = network.get_submodule(mine)
    own = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    for name in own:
        keys = tuple(f"{each}.{name}" for each in theirs)
        yield Place(f"{mine}.{name}", keys, (2 if matrix else axes) if name == "weight" else 0)


def residual_block(network: nn.Module, mine: str, theirs: str, skip: str) -> Iterator[Place]:
    """The places of a residual block by the names that CompVis' first stages and all models of diffusers give.

    Args:
        network: holds the block.
        mine, theirs: the block's names.
        skip: their name of the convolution beside.
    """
    pairs = {"norm_in": "norm1", "conv_in": "conv1", "norm_out": "norm2", "conv_out": "conv2", "skip": skip}
    if getattr(network.get_submodule(mine), "embed", None) is not None:
        pairs["embed"] = "time_emb_proj"
    for own, other in pairs.items():
        yield from leaf(network, f"{mine}.{own}", f"{theirs}.{other}")


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
        shape = place.shape(own[place.mine])
        parts = own[place.mine].chunk(len(place.theirs)) if len(place.theirs) > 1 else (own[place.mine],)
        if not own[place.mine].is_meta and own[place.mine].is_floating_point():
            check_tensor(place.mine, own[place.mine])
        for key, part in zip(place.theirs, parts, strict=True):
            theirs[key] = part.reshape(shape)
    return theirs
