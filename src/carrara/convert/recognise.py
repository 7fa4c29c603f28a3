"""Which published model a checkpoint may be, by its shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from carrara.errors import UserError
from carrara.interop import compvis, layout
from carrara.interop.compvis_unet import unet_weights
from carrara.interop.layout import Shapes, difference, first_difference, strip_prefixes
from carrara.presets import compvis_published, published, published_codecs

StateDict = Mapping[str, Tensor]


def network(checkpoint: StateDict) -> tuple[str, ...]:
    """The published models of Improved DDPM and ADM whose shapes are the checkpoint's.

    Several may share them: LSUN's models differ from the unconditional 256×256 one in their dropout only.

    Raises:
        UserError: no model fits; the nearest one and the first key that differs from it are named.
    """
    known = {name: published.shapes(name) for name in published.PUBLISHED}
    return _fitting(layout.shapes(strip_prefixes(checkpoint)), known, "model")


def first_stage(checkpoint: StateDict) -> tuple[str, ...]:
    """The published first stages whose shapes are the checkpoint's (or its first stage's).

    Raises:
        UserError: none fits; the nearest one and the first key that differs from it are named.
    """
    known = {name: published_codecs.shapes(name) for name in published_codecs.PUBLISHED}
    return _fitting(layout.shapes(compvis.own_weights(checkpoint)), known, "first stage")


def latent_unet(checkpoint: StateDict) -> tuple[str, ...]:
    """The published U-Nets of latent diffusion whose shapes are the checkpoint's; there may be none.

    Stable Diffusion 1.x differs from another number of heads by no shape, so a network of one's own that was trained
    with its sizes is taken for it.
    """
    found = layout.shapes(unet_weights(checkpoint))
    return tuple(name for name in compvis_published.PUBLISHED if compvis_published.shapes(name) == found)


def _fitting(found: Shapes, known: Mapping[str, Shapes], what: str) -> tuple[str, ...]:
    fitting = tuple(name for name, shapes in known.items() if shapes == found)
    if fitting:
        return fitting
    nearest = max(known, key=lambda name: len(known[name].items() & found.items()))
    raise UserError(
        f"the checkpoint fits no published {what}; the nearest is {nearest}, but {difference(found, known[nearest])}: "
        "name the original's arguments instead.",
        key=first_difference(found, known[nearest]),
        code="unknown",
    )
