"""The published latent diffusion and Stable Diffusion U-Nets: the constructor arguments from their configs.

From the `unet_config` of the YAML files in CompVis/latent-diffusion, CompVis/stable-diffusion and
Stability-AI/stablediffusion.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from carrara.interop import guided_diffusion
from carrara.interop.compvis_unet import unet_params
from carrara.interop.layout import Shapes
from carrara.networks import UNet

Arguments = dict[str, Any]


def _ldm(image_size: int, channels: int, mult: tuple[int, ...], **changes: Any) -> Arguments:
    """The choices of latent diffusion's models in VQ latents of 64×64×3."""
    return {
        "image_size": image_size,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": channels,
        "num_res_blocks": 2,
        "attention_resolutions": (8, 4, 2),
        "channel_mult": mult,
    } | changes


def _context(width: int, **changes: Any) -> Arguments:
    return {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": width} | changes


_SD = _ldm(
    64,
    320,
    (1, 2, 4, 4),
    in_channels=4,
    out_channels=4,
    attention_resolutions=(4, 2, 1),
    use_checkpoint=True,
    legacy=False,
)
_SD1 = _SD | _context(768, num_heads=8)
_SD2 = _SD | _context(1024, num_head_channels=64, use_linear_in_transformer=True)
_FACES = _ldm(64, 224, (1, 2, 3, 4), num_head_channels=32)
_SEMANTIC = _ldm(64, 128, (1, 4, 8), in_channels=6, attention_resolutions=(32, 16, 8), num_heads=8)

PUBLISHED: dict[str, Arguments] = {
    "ldm-celebahq-256": _FACES,
    "ldm-ffhq-256": _FACES,
    "ldm-lsun-bedrooms-256": _FACES,
    "ldm-lsun-churches-256": _ldm(
        32,
        192,
        (1, 2, 2, 4, 4),
        in_channels=4,
        out_channels=4,
        attention_resolutions=(1, 2, 4, 8),
        num_heads=8,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    "ldm-imagenet-256": _ldm(
        32,
        256,
        (1, 2, 4),
        in_channels=4,
        out_channels=4,
        attention_resolutions=(4, 2, 1),
        num_head_channels=32,
        **_context(512),
    ),
    "ldm-imagenet-256-v2": _ldm(64, 192, (1, 2, 3, 5), num_heads=1, **_context(512)),
    "ldm-text-256": _ldm(64, 192, (1, 2, 3, 5), num_head_channels=32, **_context(640)),
    "ldm-text-1.4b": _SD | {"image_size": 32} | _context(1280, num_heads=8),
    "ldm-layout-256": _ldm(64, 128, (1, 2, 3, 4), num_head_channels=32, **_context(512, transformer_depth=3)),
    "ldm-semantic-256": _SEMANTIC,
    "ldm-semantic-512": _SEMANTIC | {"image_size": 128},
    "ldm-inpainting": _ldm(64, 256, (1, 2, 3, 4), in_channels=7, num_heads=8, resblock_updown=True),
    "ldm-super-resolution": _ldm(
        64, 160, (1, 2, 2, 4), in_channels=6, attention_resolutions=(16, 8), num_head_channels=32
    ),
    "ldm-retrieval-768": _ldm(
        48,
        448,
        (1, 2, 3, 4),
        in_channels=16,
        out_channels=16,
        attention_resolutions=(4, 2, 1),
        num_head_channels=32,
        use_checkpoint=True,
        **_context(768),
    ),
    "stable-diffusion-1": _SD1,
    "stable-diffusion-1-inpainting": _SD1 | {"in_channels": 9},
    "stable-diffusion-2": _SD2,
    "stable-diffusion-2-inpainting": _SD2 | {"in_channels": 9},
    "stable-diffusion-2-depth": _SD2 | {"in_channels": 5},
    "stable-diffusion-2-unclip-l": _SD2 | {"num_classes": "sequential", "adm_in_channels": 1536},
    "stable-diffusion-2-unclip-h": _SD2 | {"num_classes": "sequential", "adm_in_channels": 2048},
    "stable-diffusion-x4-upscaler": _SD2
    | {
        "image_size": 128,
        "in_channels": 7,
        "model_channels": 256,
        "channel_mult": (1, 2, 2, 4),
        "attention_resolutions": (2, 4, 8),
        "num_classes": 1000,
        "num_heads": 8,
        "num_head_channels": -1,
        "disable_self_attentions": (True, True, True, False),
    },
}
"""Constructor arguments by our name of the model."""


@cache
def shapes(name: str) -> Shapes:
    """The shapes of a published U-Net under the original's keys."""
    with torch.device("meta"):
        return guided_diffusion.shapes(UNet(unet_params(**PUBLISHED[name])))
