"""The latent scale: the standard deviation of a codec's latents, over many batches (Rombach et al. 2022, §G)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from carrara.codecs.learned import LearnedCodec
from carrara.errors import UserError
from carrara.process.noise import Noise


@torch.no_grad()
def measure_latent_scale(
    codec: LearnedCodec, batches: Iterable[Tensor], *, per_channel: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Measure the latents' mean and standard deviation, and store the scale in the codec.

    One number for all channels scales by 1/std and shifts nothing, as in latent diffusion; per channel, the mean is
    taken off, too. Sums are float64 and every sample counts alike, so that batch sizes do not matter.

    Args:
        codec: its scale is replaced.
        batches: images [B, C, H, W] in [-1, 1]; hundreds of them, as one batch may be off.
        per_channel: a scale and a shift for every channel.
        seed: of the posterior's samples.

    Returns:
        Mean and standard deviation of the unscaled latents for every channel, float64 [C'].

    Raises:
        UserError: no batches, or constant latents.
    """
    codec.set_latent_scale(1.0)
    was_training = codec.training
    codec.eval()
    device = codec.latent_scale.device
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    images = 0
    for batch in batches:
        noise = Noise(seed).rows(range(images, images + len(batch)))
        latent = codec.encode(batch.to(device)).sample(noise).double().cpu()
        images += len(batch)
        count += latent.numel() // latent.shape[1]
        total = total + latent.sum((0, 2, 3))
        squares = squares + latent.square().sum((0, 2, 3))
    codec.train(was_training)
    if count == 0:
        raise UserError(
            "the latent scale cannot be measured without images: check the data.", key="batches", code="missing"
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if per_channel:
        codec.set_latent_scale(1 / std, mean)
    else:
        overall = ((squares / count).mean() - mean.mean().square()).clamp(min=0).sqrt()
        codec.set_latent_scale(1 / overall)
    return mean, std
