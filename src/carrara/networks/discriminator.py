"""The patch discriminator: whether each patch of a picture is real (Isola et al. 2017, appendix 6.1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.networks.layers import GroupNorm
from carrara.networks.memory import channels_last
from carrara.networks.params import Params, times

Norm = Literal["batch", "group"]
SLOPE = 0.2
"""Of the leaky rectifiers."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorParams(Params):
    """What the discriminator is made of.

    Attributes:
        in_channels: channels of the picture.
        channels: width of the first layer; each next one is twice as wide, up to eight times.
        layers: how often the size is halved. 3 looks at patches of 70×70 pixels, 2 at 34×34, 1 at 16×16.
        norm: "batch", as published: the statistics are those of the micro-batch on one process. "group" (of 32
            channel groups) sees each picture alone, so that neither batch nor processes matter.
    """

    section: ClassVar[str] = "discriminator"

    in_channels: int = 3
    channels: int = 64
    layers: int = 3
    norm: Norm = "batch"

    def _check(self) -> None:
        self._at_least(1, "in_channels", "channels", "layers")
        self._one_of("norm", get_args(Norm))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each layer but the last."""
        return tuple(self.channels * min(2**layer, 8) for layer in range(self.layers + 1))

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError unless pictures of this size leave at least one patch."""
        # Each halving keeps ⌊side/2⌋, the two last layers take one position each.
        side = min(height, width)
        if side // 2**self.layers >= 3:
            return
        raise UserError(
            f"pictures of {times((height, width))} leave no patch to a discriminator of {self.layers} layers: set "
            f"discriminator.layers to {max(1, (side // 3).bit_length() - 1)} or less.",
            key="discriminator.layers",
            code="shape",
        )


class _Block(nn.Module):
    """Convolution without bias, norm, leaky rectifier."""

    def __init__(self, params: DiscriminatorParams, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 4, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if params.norm == "batch" else GroupNorm(out_channels)

    def forward(self, h: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(h)), SLOPE, inplace=True)


class Discriminator(nn.Module):
    """Pictures [B, C, H, W] in [-1, 1] to one logit for each patch, [B, 1, h, w]: high where it looks real."""

    def __init__(self, params: DiscriminatorParams) -> None:
        super().__init__()
        self.params = params
        widths = params.widths
        self.stem = nn.Conv2d(params.in_channels, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            _Block(params, widths[layer - 1], widths[layer], stride=2 if layer < params.layers else 1)
            for layer in range(1, params.layers + 1)
        )
        self.out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d | GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Raises:
        UserError: pictures too small to leave a patch.
        """
        self.params.check_size(*x.shape[2:])
        h = F.leaky_relu(self.stem(channels_last(x)), SLOPE, inplace=True)  # [B, C_0, H/2, W/2]
        for block in self.blocks:
            h = block(h)  # [B, C_i, H/2^(i+1), W/2^(i+1)]; the last keeps the size but for one position
        return self.out(h)  # type: ignore[no-any-return]  # [B, 1, H/2^n - 2, W/2^n - 2]
