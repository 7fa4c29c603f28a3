"""Guidance: Denoiser -> Denoiser, one rule a file. Rules compose by calling them on one another's result.

The order of guided-diffusion, which a reader can see in the code that applies it:

    network → classifier-free (or autoguidance, or several conditions) → threshold → classifier

Nothing is clamped after the classifier. Every rule hands on what it does not change: a learned variance, and
guidance that another rule left pending.
"""

from carrara.guidance.autoguidance import autoguidance
from carrara.guidance.classifier import classifier_guidance
from carrara.guidance.classifier_free import classifier_free
from carrara.guidance.compose import compose
from carrara.guidance.interval import interval
from carrara.guidance.threshold import dynamic_threshold, static_threshold

__all__ = [
    "autoguidance",
    "classifier_free",
    "classifier_guidance",
    "compose",
    "dynamic_threshold",
    "interval",
    "static_threshold",
]
