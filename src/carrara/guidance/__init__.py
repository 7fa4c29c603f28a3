"""Guidance: Denoiser -> Denoiser, one rule a file.

They compose by calling; the order is network → classifier-free → threshold → classifier.
"""

from carrara.guidance.classifier_free import classifier_free
from carrara.guidance.threshold import static_threshold

__all__ = ["classifier_free", "static_threshold"]
