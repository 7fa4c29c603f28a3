"""Two towers, one of images and one of texts, that meet in one space (Radford et al. 2021, CLIP)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.networks.layers import GroupNorm, convolution, largest_divisor
from carrara.networks.params import Params
from carrara.networks.text import TextTransformer

LARGEST_SCALE = 100.0
"""Of the logits, as CLIP has it: 1/temperature."""


@dataclass(frozen=True, kw_only=True)
class TowersParams(Params):
    """What the towers are made of. A tower of frozen features is its head alone.

    Attributes:
        width: D of the common space.
        image_features: length of frozen image features; 0 trains an encoder of images.
        text_features: length of frozen text features; 0 trains an encoder of `vocabulary` ids.
        image_size, image_channels: of the images that the trained encoder reads.
        channels: of its first level; each of `levels` halves the sides and doubles the channels.
        levels: see `channels`.
        vocabulary, text_width, text_layers: of the trained encoder of texts.
        dropout: probability of each feature before a head.
    """

    width: int = 128
    image_features: int = 0
    text_features: int = 0
    image_size: tuple[int, int] = (64, 64)
    image_channels: int = 3
    channels: int = 32
    levels: int = 4
    vocabulary: int = 0
    text_width: int = 128
    text_layers: int = 2
    dropout: float = 0.0

    def _check(self) -> None:
        self._at_least(1, "width", "channels", "levels", "text_width")
        self._at_least(0, "image_features", "text_features", "vocabulary", "text_layers")
        self._fraction("dropout")
        self._require(
            self.text_features or self.vocabulary, "vocabulary", "is 0: a trained text encoder needs one.", "missing"
        )
        small = not self.image_features and min(self.image_size) < 2**self.levels
        sides = "×".join(map(str, self.image_size))
        self._require(not small, "levels", f"is {self.levels}: images of {sides} cannot be halved so often.", "shape")


class ImageTower(nn.Module):
    """Strided convolutions with group norms, averaged over the places: [B, C, H, W] to [B, F]."""

    def __init__(self, params: TowersParams) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(2, params.image_channels, params.channels)]
        width = params.channels
        for _ in range(params.levels):
            out = 2 * width
            layers += [GroupNorm(width, largest_divisor(width, 8)), nn.SiLU()]
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1)]
            layers += [GroupNorm(out, largest_divisor(out, 8)), nn.SiLU(), convolution(2, out, out)]
            width = out
        self.layers = nn.Sequential(*layers, GroupNorm(width, largest_divisor(width, 8)), nn.SiLU())
        self.features = width

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))  # type: ignore[no-any-return]


class Towers(nn.Module):
    """Unit vectors of images and texts, and the logits of all pairs."""

    def __init__(self, params: TowersParams) -> None:
        super().__init__()
        self.params = params
        self.image = None if params.image_features else ImageTower(params)
        self.text = None
        if not params.text_features:
            self.text = TextTransformer(params.vocabulary, params.text_width, params.text_layers)
        image = params.image_features if self.image is None else self.image.features
        self.image_head = nn.Linear(image, params.width, bias=False)
        self.text_head = nn.Linear(params.text_features or params.text_width, params.width, bias=False)
        self.dropout = nn.Dropout(params.dropout)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], or their frozen features [B, F], to unit vectors [B, D]."""
        features = images if self.image is None else self.image(images)
        return F.normalize(self.image_head(self.dropout(features)), dim=1)

    def embed_texts(self, condition: Condition) -> Tensor:
        """Texts, as `tokens` [B, L] or as frozen features in `vector` [B, F], to unit vectors [B, D]."""
        if self.text is None:
            features = condition.vector
        else:
            features = None if condition.tokens is None else self.text(condition.tokens).mean(1)
        if features is None:
            raise UserError("the scorer needs texts.", key="captions", code="missing")
        return F.normalize(self.text_head(self.dropout(features)), dim=1)

    def forward(self, images: Tensor, condition: Condition) -> Tensor:
        """Logits [B, B]: image i against text j, their cosine over the temperature."""
        scale = self.log_scale.exp().clamp(max=LARGEST_SCALE)
        return scale * self.embed_images(images) @ self.embed_texts(condition).T
