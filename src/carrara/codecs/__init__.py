"""Codecs: pixels to what the diffusion model works in, and back."""

from carrara.codecs.autoencoder import Autoencoder
from carrara.codecs.base import Codec, Exact, Identity, Posterior
from carrara.codecs.discrete import DiscreteAutoencoder, DiscreteParams
from carrara.codecs.hierarchical import HierarchicalVAE
from carrara.codecs.kl import DiagonalGaussian, KLAutoencoder
from carrara.codecs.learned import LearnedCodec, Reconstruction
from carrara.codecs.quantiser import Codes, QuantiserParams
from carrara.codecs.scale import measure_latent_scale
from carrara.codecs.storage import build, check_same, content_hash, load, same_latents, save
from carrara.codecs.tiling import Tiled, whole
from carrara.codecs.vq import VQAutoencoder

__all__ = [
    "Autoencoder",
    "Codec",
    "Codes",
    "DiagonalGaussian",
    "DiscreteAutoencoder",
    "DiscreteParams",
    "Exact",
    "HierarchicalVAE",
    "Identity",
    "KLAutoencoder",
    "LearnedCodec",
    "Posterior",
    "QuantiserParams",
    "Reconstruction",
    "Tiled",
    "VQAutoencoder",
    "build",
    "check_same",
    "content_hash",
    "load",
    "measure_latent_scale",
    "same_latents",
    "save",
    "whole",
]
