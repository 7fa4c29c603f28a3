"""EfficientNet-Lite0's weights as EfficientNet-PyTorch names them, in."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from carrara.errors import UserError
from carrara.networks.efficientnet import EfficientNetLite0

_TOP = {
    "_conv_stem": "stem.convolution",
    "_bn0": "stem.norm",
    "_conv_head": "head.convolution",
    "_bn1": "head.norm",
    "_fc": "classes",
}
_IN_BLOCK = {
    "_expand_conv": "expand.convolution",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.convolution",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.convolution",
    "_bn2": "project.norm",
}


def own_key(key: str) -> str | None:
    """Our name of one of their weights; None where there is none."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", key)
    if block is not None and block[2] in _IN_BLOCK:
        return f"blocks.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"
    part, _, name = key.partition(".")
    return f"{_TOP[part]}.{name}" if part in _TOP else None


def load(state_dict: Mapping[str, Tensor]) -> EfficientNetLite0:
    """The network with these weights.

    Raises:
        UserError: a weight is missing, unknown or of another shape; `key` is its name.
    """
    network = EfficientNetLite0()
    expected = network.state_dict()
    named = {own_key(key) or key: (key, value) for key, value in state_dict.items()}
    for name, value in expected.items():
        if name not in named or named[name][1].shape != value.shape:
            their = named[name][0] if name in named else name
            raise UserError(
                f"these are no weights of EfficientNet-Lite0: {their} is missing or of another shape.",
                key=their,
                code="mismatch",
            )
    for name, (key, _) in named.items():
        if name not in expected:
            raise UserError(f"EfficientNet-Lite0 has no weight {key}.", key=key, code="unknown")
    network.load_state_dict({name: value for name, (_, value) in named.items()})
    return network.eval().requires_grad_(False)
