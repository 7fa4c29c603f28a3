"""Codecs small enough for every test, and pictures for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carrara.codecs import (
    Autoencoder,
    DiscreteAutoencoder,
    DiscreteParams,
    HierarchicalVAE,
    KLAutoencoder,
    LearnedCodec,
    QuantiserParams,
    VQAutoencoder,
)
from carrara.networks.autoencoder import AutoencoderParams


def params(**changes: Any) -> AutoencoderParams:
    """Two levels of 8 and 16 channels: a reduction of 2."""
    chosen: dict[str, Any] = {
        "channels": 8,
        "channel_mult": (1, 2),
        "blocks_per_level": 1,
        "latent_channels": 3,
        "norm_groups": 4,
    }
    return AutoencoderParams(**(chosen | changes))


def upper() -> AutoencoderParams:
    """The level above `params()` in a hierarchy."""
    return params(in_channels=3, latent_channels=5)


CODECS: dict[str, Callable[[], LearnedCodec]] = {
    "autoencoder": lambda: Autoencoder(params()),
    "kl": lambda: KLAutoencoder(params(), learned_scale=True),
    "vq": lambda: VQAutoencoder(params(), QuantiserParams(codes=16)),
    "vq-gradient": lambda: VQAutoencoder(params(), QuantiserParams(codes=16, decay=None, restart=0.0)),
    "discrete": lambda: DiscreteAutoencoder(params(), DiscreteParams(codes=16), learned_scale=True),
    "hierarchical": lambda: HierarchicalVAE([params(), upper()]),
}


def make(kind: str, seed: int = 0) -> LearnedCodec:
    """A codec whose zero-initialised layers are drawn, too, so that nothing hides behind a zero."""
    torch.manual_seed(seed)
    codec = CODECS[kind]()
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return codec


def pictures(count: int = 2, size: int = 8, seed: int = 1) -> Tensor:
    """Smooth pictures in [-1, 1], [count, 3, size, size]."""
    drawn = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(drawn, size=(size, size), mode="bilinear").tanh()
