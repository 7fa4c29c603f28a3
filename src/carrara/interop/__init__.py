"""Checkpoint layouts of other programs: pure dict to dict, both directions, every key used."""

from carrara.interop import guided_diffusion

__all__ = ["guided_diffusion"]
