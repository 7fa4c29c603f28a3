"""The published models of Improved DDPM and ADM: their networks, and the processes they were trained for.

From the flags in the READMEs of openai/improved-diffusion (Nichol & Dhariwal 2021) and openai/guided-diffusion
(Dhariwal & Nichol 2021, appendix I).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from carrara.interop import guided_diffusion
from carrara.interop.layout import Shapes
from carrara.interop.unet_keys import Network
from carrara.networks import EncoderClassifier, EncoderClassifierParams, UNet, UNetParams


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint.

    Attributes:
        params: the network.
        schedule: "linear" or "cosine".
        steps: the length T of the process.
        rescaled_time: the network takes t·1000/T (`rescale_timesteps`).
        files: the names that the checkpoints of these shapes were published under.
    """

    params: UNetParams | EncoderClassifierParams
    schedule: str
    steps: int = 1000
    rescaled_time: bool = False
    files: tuple[str, ...]

    def network(self) -> Network:
        """The network with random weights (under `torch.device("meta")`: with shapes only)."""
        if isinstance(self.params, EncoderClassifierParams):
            return EncoderClassifier(self.params)
        return UNet(self.params)


_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _adm(size: int, **changes: object) -> UNetParams:
    """ADM's choices at one size: attention at 32, 16 and 8, two blocks a level, heads of 64 channels."""
    params = UNetParams(
        image_size=(size, size),
        channels=256,
        channel_mult=_MULT[size],
        attention=(size // 32, size // 16, size // 8),
        head_channels=64,
        qkv_order="legacy",
        learned_variance=True,
        num_classes=1000,
    )
    return replace(params, **changes)  # type: ignore[arg-type]


def _improved(size: int, **changes: object) -> UNetParams:
    """Improved DDPM's choices: four heads, convolutions that change the size, attention at 16 and 8."""
    params = UNetParams(
        image_size=(size, size),
        channels=128,
        channel_mult=_MULT[size],
        blocks_per_level=3,
        attention=(size // 16, size // 8),
        heads=4,
        qkv_order="legacy",
        resampling="convolution",
        learned_variance=True,
    )
    return replace(params, **changes)  # type: ignore[arg-type]


def _classifier(size: int, depth: int = 2) -> EncoderClassifierParams:
    return EncoderClassifierParams(
        image_size=(size, size),
        channels=128,
        channel_mult=_MULT[size],
        blocks_per_level=depth,
        attention=(size // 32, size // 16, size // 8),
        head_channels=64,
        qkv_order="legacy",
        num_classes=1000,
    )


_UPSAMPLER = {"channels": 192, "concat_channels": 3, "upsample_concat": True}
_LSUN = ("lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt")

PUBLISHED: dict[str, Published] = {
    "adm-imagenet-64": Published(
        params=_adm(64, channels=192, blocks_per_level=3, qkv_order="new", dropout=0.1),
        schedule="cosine",
        files=("64x64_diffusion.pt",),
    ),
    "adm-imagenet-128": Published(
        params=_adm(128, heads=4, head_channels=None), schedule="linear", files=("128x128_diffusion.pt",)
    ),
    "adm-imagenet-256": Published(params=_adm(256), schedule="linear", files=("256x256_diffusion.pt",)),
    "adm-imagenet-256-unconditional": Published(
        params=_adm(256, num_classes=None),
        schedule="linear",
        files=("256x256_diffusion_uncond.pt", "lsun_horse_nodropout.pt"),
    ),
    "adm-imagenet-512": Published(params=_adm(512), schedule="linear", files=("512x512_diffusion.pt",)),
    "adm-lsun-256": Published(params=_adm(256, num_classes=None, dropout=0.1), schedule="linear", files=_LSUN),
    "adm-upsampler-64-256": Published(
        params=_adm(256, **_UPSAMPLER, heads=4, head_channels=None),
        schedule="linear",
        files=("64_256_upsampler.pt",),
    ),
    "adm-upsampler-128-512": Published(
        params=_adm(512, **_UPSAMPLER, channel_mult=_MULT[256], attention=(16, 32)),
        schedule="linear",
        files=("128_512_upsampler.pt",),
    ),
    "adm-classifier-64": Published(params=_classifier(64, depth=4), schedule="cosine", files=("64x64_classifier.pt",)),
    "adm-classifier-128": Published(params=_classifier(128), schedule="linear", files=("128x128_classifier.pt",)),
    "adm-classifier-256": Published(params=_classifier(256), schedule="linear", files=("256x256_classifier.pt",)),
    "adm-classifier-512": Published(params=_classifier(512), schedule="linear", files=("512x512_classifier.pt",)),
    "improved-imagenet-64": Published(
        params=_improved(64),
        schedule="cosine",
        steps=4000,
        rescaled_time=True,
        files=("imagenet64_uncond_100M_1500K.pt", "imagenet64_uncond_vlb_100M_1500K.pt"),
    ),
    "improved-imagenet-64-class": Published(
        params=_improved(64, channels=192, num_classes=1000),
        schedule="cosine",
        steps=4000,
        files=("imagenet64_cond_270M_250K.pt",),
    ),
    "improved-cifar10": Published(
        params=_improved(32, dropout=0.3),
        schedule="cosine",
        steps=4000,
        rescaled_time=True,
        files=("cifar10_uncond_50M_500K.pt", "cifar10_uncond_vlb_50M_500K.pt"),
    ),
    "improved-lsun-bedroom-256": Published(
        params=_improved(256, blocks_per_level=2, heads=1, adaptive_norm=False, attention=(16,)),
        schedule="linear",
        files=("lsun_uncond_100M_1200K_bs128.pt", "lsun_uncond_100M_2400K_bs64.pt"),
    ),
    "improved-upsampler-64-256": Published(
        params=_improved(256, **_UPSAMPLER, blocks_per_level=2, num_classes=1000),
        schedule="linear",
        steps=4000,
        files=("upsample_cond_500K.pt",),
    ),
}


@cache
def shapes(name: str) -> Shapes:
    """The shapes of a published checkpoint under the original's keys."""
    with torch.device("meta"):
        return guided_diffusion.shapes(PUBLISHED[name].network())
