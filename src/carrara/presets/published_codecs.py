"""The published first stages: the constructor arguments from their configs.

From the YAML files of the checkpoints of CompVis/latent-diffusion, CompVis/stable-diffusion,
Stability-AI/stablediffusion and CompVis/taming-transformers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from carrara.codecs.learned import LearnedCodec
from carrara.errors import UserError, nearest
from carrara.interop import compvis, layout, taming
from carrara.interop.layout import Shapes

Arguments = dict[str, Any]


def _first_stage(latent: int, mult: tuple[int, ...], attends: tuple[int, ...] = (), **changes: Any) -> Arguments:
    """The choices that all published first stages share: 128 channels, two blocks a level, trained at 256×256."""
    return {
        "embed_dim": latent,
        "ddconfig": {
            "z_channels": latent,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": mult,
            "num_res_blocks": 2,
            "attn_resolutions": attends,
            "dropout": 0.0,
        }
        | changes,
    }


def _kl(latent: int, mult: tuple[int, ...], attends: tuple[int, ...] = ()) -> Arguments:
    return _first_stage(latent, mult, attends, double_z=True)


def _vq(codes: int, latent: int, mult: tuple[int, ...], attends: tuple[int, ...] = (), **changes: Any) -> Arguments:
    return {"n_embed": codes} | _first_stage(latent, mult, attends, double_z=False, **changes)


_F16 = (1, 1, 2, 2, 4)


def _vqgan(codes: int, channels: int = 3) -> Arguments:
    return _vq(codes, 256, _F16, (16,), in_channels=channels, out_ch=channels)


PUBLISHED: dict[str, Arguments] = {
    "ldm-kl-f4": _kl(3, (1, 2, 4)),
    "ldm-kl-f8": _kl(4, (1, 2, 4, 4)),
    "ldm-kl-f16": _kl(16, _F16, (16,)),
    "ldm-kl-f32": _kl(64, (1, 1, 2, 2, 4, 4), (16, 8)),
    "stable-diffusion": _kl(4, (1, 2, 4, 4)) | {"scale_factor": 0.18215},
    "stable-diffusion-x4-upscaler": _kl(4, (1, 2, 4)) | {"scale_factor": 0.08333},
    "ldm-vq-f4": _vq(8192, 3, (1, 2, 4)),
    "ldm-vq-f4-noattn": _vq(8192, 3, (1, 2, 4), attn_type="none"),
    "ldm-vq-f8": _vq(16384, 4, (1, 2, 2, 4), (32,)),
    "ldm-vq-f8-n256": _vq(256, 4, (1, 2, 2, 4), (32,)),
    "ldm-vq-f16": _vq(16384, 8, _F16, (16,)),
    "vqgan-f16-1024": _vqgan(1024),
    "vqgan-f16-16384": _vqgan(16384),
    "vqgan-coco-f16-8192": _vqgan(8192),
    "vqgan-depth-f16-1024": _vqgan(1024, channels=1),
    "vqgan-flickr-segmentation-f16-1024": _vqgan(1024, channels=182),
    "vqgan-coco-segmentation-f16-1024": _vqgan(1024, channels=183),
    "vqgan-ade20k-segmentation-f16-1024": _vqgan(1024, channels=151),
    "vqgan-gumbel-f8-8192": _vq(8192, 256, (1, 1, 2, 4), (32,)) | {"kl_weight": 1e-8},
}
"""By name. VQGANs of equal shape (ImageNet, faces, landscapes at 1024 codes) share one entry."""
PRESETS = tuple(name for name, arguments in PUBLISHED.items() if arguments["ddconfig"]["in_channels"] in (1, 3))
"""Those of pictures: segmentation maps have a channel for every class, and are else as `vqgan-f16-1024`."""


def preset(name: str) -> dict[str, Any]:
    """The `config()` of a published first stage, for a codec of its shape.

    Raises:
        UserError: an unknown name; the nearest is named.
    """
    if name not in PRESETS:
        raise UserError(f"codec.preset is '{name}': {nearest(str(name), PRESETS)}", key="codec.preset", code="unknown")
    return on_meta(PUBLISHED[name]).config()


@cache
def shapes(name: str) -> Shapes:
    """The shapes of a published first stage under the original's keys."""
    codec = on_meta(PUBLISHED[name])
    return layout.shapes(layout.to_theirs(codec, compvis.places(codec)))


def on_meta(arguments: Arguments) -> LearnedCodec:
    """The codec of some arguments without its weights."""
    with torch.device("meta"):
        if "kl_weight" in arguments:
            return taming.gumbel(**arguments)
        return compvis.untrained(**{k: v for k, v in arguments.items() if k != "scale_factor"})
