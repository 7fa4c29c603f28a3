"""Codecs: pixels to what the diffusion model works in, and back."""

from carrara.codecs.base import Codec, Exact, Identity, Posterior

__all__ = ["Codec", "Exact", "Identity", "Posterior"]
