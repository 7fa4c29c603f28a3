"""Loss terms that are differentiated with respect to the image alone, once.

VQGAN's adaptive weight needs the gradients of its terms at the decoder's last layer before their sum is known, and the
original passes backward through discriminator and perceptual network three times for it. Here each term is
differentiated once, from the image on; the weight is made from these gradients (`adversarial.adaptive_weight`), and
their weighted sum is what the training's backward pass starts from at the image. The result is that of plain autograd
on the sum (Esser et al. 2021, eq. 5-7), which `tests/objectives/test_codec.py` shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageLoss:
    """A loss L(x̂) of images with its gradient: `ImageLoss.of(a, image) * weight + ImageLoss.of(b, image)`.

    Attributes:
        value: L, [B]; differentiable in the weights that scaled it only.
        gradient: ∂ΣL/∂x̂, [B, C, H, W]; zeros where gradients are off.
    """

    value: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, value: Tensor, image: Tensor) -> ImageLoss:
        """Differentiate values [B] with respect to the image that they were computed from, a leaf [B, C, H, W]."""
        if not torch.is_grad_enabled():
            return cls(value, torch.zeros_like(image))
        return cls(value.detach(), torch.autograd.grad(value.sum(), image)[0])

    @classmethod
    def zero(cls, image: Tensor) -> ImageLoss:
        """A term that is 0 for all images."""
        return cls(image.new_zeros(len(image)), torch.zeros_like(image))

    def __add__(self, other: ImageLoss | Tensor) -> ImageLoss:
        """The sum with another term, or with a number [] or numbers [B] that do not depend on the image."""
        if isinstance(other, Tensor):
            return ImageLoss(self.value + other, self.gradient)
        return ImageLoss(self.value + other.value, self.gradient + other.gradient)

    def __mul__(self, weight: Tensor) -> ImageLoss:
        """The term scaled by a number [] or by numbers [B]; learned ones get their gradient from `value`."""
        column = weight.detach().reshape(-1, *[1] * (self.gradient.ndim - 1))
        return ImageLoss(self.value * weight, self.gradient * column)

    def at(self, image: Tensor) -> Tensor:
        """The values [B], whose gradient with respect to the image, as a network made it, is `gradient`."""
        zero = (image.float() * self.gradient).flatten(1).sum(1)
        return self.value + (zero - zero.detach())
