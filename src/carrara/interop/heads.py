"""Attention heads as other programs count them. Nothing here changes what a network answers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

from carrara.networks import UNet
from carrara.networks.backbone import BackboneParams
from carrara.networks.layers import SelfAttention, count_heads

AnyParams = TypeVar("AnyParams", bound=BackboneParams)


def head_width(params: BackboneParams) -> int | None:
    """The channels of one head, where all places that attend agree on them."""
    widths = {width // count_heads(width, params.heads, params.head_channels) for width in params.attended_widths}
    return widths.pop() if len(widths) == 1 else None


def with_width(params: AnyParams) -> AnyParams:
    """The same params with the width of a head, where it was left to the rule (the widest that fits up to 64)."""
    width = head_width(params) if params.heads is None and params.head_channels is None else None
    return params if width is None else replace(params, head_channels=width)


def in_new_order(network: UNet) -> UNet:
    """The same network (a copy, where it differs) with the channels of its joint projections counted as q, k, v, and
    heads within."""
    if network.params.qkv_order == "new":
        return network
    network = copy.deepcopy(network)
    network.params = replace(network.params, qkv_order="new")
    for layer in network.modules():
        if isinstance(layer, SelfAttention):
            for parameter in layer.qkv.parameters():
                by_head = parameter.data.unflatten(0, (layer.heads, 3, -1))
                parameter.data = by_head.transpose(0, 1).reshape(parameter.shape)
            layer.order = "new"
    return network
