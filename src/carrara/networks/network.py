"""What every network is to the rest of the package, and the registry of kinds.

A network of one's own is added from any file, and is then trained, saved, loaded and sampled like the others
(`network.kind: mine` in a recipe):

    class Mine(Network):
        def __init__(self, params: MineParams) -> None: ...
        def forward(self, x, network_time, condition=None): ...

    register("mine", Mine, MineParams)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, ClassVar

from torch import nn

from carrara.errors import UserError, nearest
from carrara.networks.layers import blocks


class Network(nn.Module):
    """`network(x, network_time, condition) -> raw`: what a denoiser or a classifier is built around.

    A subclass is made from one params object, `MyNetwork(params)`, and overrides what differs from the defaults here.

    Attributes:
        kind: its name in the registry, set by `register`.
        params: the dataclass that it was made from: plain data.
    """

    kind: ClassVar[str] = ""
    params: Any

    @property
    def takes(self) -> Mapping[str, int]:
        """The slots of `Condition` that the network reads, with their widths (of `label`: the number of rows)."""
        return {}

    @property
    def learned_variance(self) -> bool:
        """Whether the output holds a raw variance fraction after the prediction (Nichol & Dhariwal 2021, eq. 15)."""
        return False

    @property
    def shard_units(self) -> Sequence[nn.Module]:
        """The parts that are sharded one by one, each gathered right before it is used."""
        return blocks(self)


_KINDS: dict[str, tuple[type[Network], type]] = {}


def register(kind: str, network: type[Network], params: type) -> None:
    """Make a network known to recipes and saved models.

    Args:
        kind: its name, `network.kind` in a recipe.
        network: the class, made as `network(params)`.
        params: a dataclass of plain data. The fields `image_size`, `in_channels`, `num_classes`, `null_label`,
            `vector_channels`, `concat_channels` and `upsample_concat`, where it has them, follow from a recipe's data
            and conditioning.

    Raises:
        UserError: the kind or one of the classes is registered already, or the params are no dataclass.
    """
    if not is_dataclass(params):
        raise UserError(f"{params.__name__} is no dataclass: decorate it with @dataclass.", key="network.kind")
    for known, (network_class, params_class) in _KINDS.items():
        if known == kind or network_class is network or params_class is params:
            raise UserError(
                f"the network kind '{kind}' ({network.__name__}, {params.__name__}) cannot be registered: '{known}' "
                f"is already {network_class.__name__} with {params_class.__name__}.",
                key="network.kind",
                code="conflict",
            )
    network.kind = kind
    _KINDS[kind] = network, params


def kinds() -> tuple[str, ...]:
    """The registered kinds."""
    return tuple(_KINDS)


def params_class(kind: str) -> type:
    """The params dataclass of a kind.

    Raises:
        UserError: an unknown kind; the nearest is named.
    """
    if kind not in _KINDS:
        raise UserError(f"network.kind is '{kind}': {nearest(str(kind), _KINDS)}", key="network.kind", code="unknown")
    return _KINDS[kind][1]


def create(params: Any) -> Network:
    """The network of these params, with random weights.

    Raises:
        UserError: params of no registered network.
    """
    for network, params_type in _KINDS.values():
        if params_type is type(params):
            return network(params)
    raise UserError(
        f"{type(params).__name__} belongs to no registered network: call carrara.networks.register.",
        key="network.kind",
        code="unknown",
    )


def build(config: Mapping[str, Any]) -> Network:
    """A network with random weights from what `config` returned, or from any part of it: the rest is the default.

    Raises:
        UserError: an unknown kind or key (the nearest is named), or values that do not fit together.
    """
    rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    params_type = params_class(rest.pop("kind", ""))
    known = {field.name for field in fields(params_type)}
    for key in rest.keys() - known:
        raise UserError(f"network.{key} is unknown: {nearest(key, known)}", key=f"network.{key}", code="unknown")
    return create(params_type(**rest))


def config(network: nn.Module) -> dict[str, Any]:
    """A network's kind and params as plain data: `build(config(network))` is of the same shape.

    Raises:
        UserError: the module is no registered network.
    """
    if not isinstance(network, Network) or network.kind not in _KINDS:
        raise UserError(
            f"{type(network).__name__} is no registered network, so it cannot be saved: derive it from "
            "carrara.networks.Network and call carrara.networks.register.",
            key="network.kind",
            code="unsupported",
        )
    return {"kind": network.kind, **asdict(network.params)}
