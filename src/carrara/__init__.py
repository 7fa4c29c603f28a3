"""Carrara: the whole life of a diffusion model.

`from carrara import DiffusionModel` is all that page one needs. Heavy imports wait until they are used, so
that `carrara --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from carrara.version import __version__

__all__ = ["Classifier", "DiffusionModel", "__version__", "load"]

if TYPE_CHECKING:
    from carrara.classifier import Classifier
    from carrara.loading import load
    from carrara.model import DiffusionModel


def __getattr__(name: str) -> object:
    if name == "DiffusionModel":
        from carrara.model import DiffusionModel

        return DiffusionModel
    if name == "Classifier":
        from carrara.classifier import Classifier

        return Classifier
    if name == "load":
        from carrara.loading import load

        return load
    raise AttributeError(f"module 'carrara' has no attribute '{name}'")
