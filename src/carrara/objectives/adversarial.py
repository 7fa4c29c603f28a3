"""The adversarial term of a codec: the losses of discriminator and codec, and their adaptive weight."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from carrara.codecs.learned import Reconstruction
from carrara.distributed import gather
from carrara.errors import UserError

GAN = Literal["hinge", "logarithmic"]
LARGEST_WEIGHT = 1e4
"""The adaptive weight is clamped to it (taming-transformers)."""
DELTA = 1e-4
"""δ, which keeps the adaptive weight's denominator from 0 (Esser et al. 2021, eq. 7; the value is their code's)."""


def discriminator_loss(real: Tensor, fake: Tensor, gan: GAN) -> Tensor:
    """The discriminator's loss, from the logits [B, N] of real pictures and of reconstructions, [B].

    "hinge": ½·(max(0, 1 - real) + max(0, 1 + fake)); "logarithmic": -½·(ln D(x) + ln(1 - D(x̂))), D = sigmoid(logit).
    """
    if gan == "hinge":
        return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(1)
    return 0.5 * (F.softplus(-real) + F.softplus(fake)).mean(1)


def generator_loss(fake: Tensor) -> Tensor:
    """The codec's loss against either discriminator, from the logits [B, …] of its reconstructions: -mean, [B]."""
    return -fake.float().flatten(1).mean(1)


def adaptive_weight(made: Reconstruction, of_error: Tensor, of_g_loss: Tensor, seen: int = 0) -> Tensor:
    """λ = ‖∇L_rec‖ / (‖∇L_GAN‖ + 1e-4), at most 1e4; ∇ with respect to the decoder's last layer, of the mean over all
    processes' samples (Esser et al. 2021, eq. 7).

    The last layer is a convolution, so its gradient is made from the layer's input and the gradient at its output;
    the layer itself need not be whole on this process.

    Args:
        made: the codec's reconstruction.
        of_error, of_g_loss: gradients of the summed terms with respect to the image, [B, C, H, W].
        seen: how many images the run has seen, for the message.

    Raises:
        UserError: a gradient is not finite.
    """
    norms = [float(_last_layer_gradient(made, gradient).norm()) for gradient in (of_error, of_g_loss)]
    if not all(math.isfinite(norm) for norm in norms):
        raise UserError(
            f"the adaptive weight is not a number after {seen:,} images: the last layer's gradient is {norms[0]:g} of "
            f"the reconstruction and {norms[1]:g} of the discriminator's loss. Go back to an earlier checkpoint "
            "with a lower learning rate, or start the discriminator later.",
            key="training.learning_rate",
            code="not_finite",
        )
    return of_error.new_tensor(min(norms[0] / (norms[1] + DELTA), LARGEST_WEIGHT))


def _last_layer_gradient(made: Reconstruction, gradient: Tensor) -> Tensor:
    """The gradient of a mean over samples with respect to the last layer's 3×3 kernel, over all processes' samples."""
    features = made.features.float()
    if made.tanh:
        gradient = gradient * (1 - made.image.detach().float().square())
    shape = (gradient.shape[1], features.shape[1], 3, 3)
    kernel = conv2d_weight(features, shape, gradient / len(gradient), padding=1)
    return gather(kernel[None]).mean(0)
