"""Model folders of diffusers, in and out: first stages (`AutoencoderKL`, `VQModel`) and U-Nets."""

from carrara.interop.diffusers_codec import load_codec, save_codec
from carrara.interop.diffusers_unet import load_unet, save_unet

__all__ = ["load_codec", "load_unet", "save_codec", "save_unet"]
