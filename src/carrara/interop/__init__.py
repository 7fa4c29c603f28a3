"""Checkpoint layouts of other programs: pure dict to dict, both directions, every key used."""

from carrara.interop import compvis, diffusers_layout, guided_diffusion, lpips, taming

__all__ = ["compvis", "diffusers_layout", "guided_diffusion", "lpips", "taming"]
