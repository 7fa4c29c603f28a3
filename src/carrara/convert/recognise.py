"""Which published model a checkpoint may be, by its shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from carrara.errors import UserError, nearest
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


def choose(
    name: str | None, arguments: Collection[str], by_shapes: Callable[[], Iterable[str]], known: Collection[str]
) -> list[str]:
    """The published models that a checkpoint may be: the one that the user names, else those of its shapes; none where
    arguments describe it.

    Args:
        name: the user's.
        arguments: of the original's constructor.
        by_shapes: finds the names of the models whose shapes are the checkpoint's.
        known: all names.

    Raises:
        UserError: an unknown name (the nearest is given), or a name and arguments at once.
    """
    if name is not None and name not in known:
        raise UserError(f"there is no published model '{name}': {nearest(name, known)}", key="--as", code="unknown")
    if name is not None and arguments:
        raise UserError(
            f"'{name}' names the whole network: leave out {', '.join(arguments)}.", key="--as", code="conflict"
        )
    return [] if arguments else [name] if name is not None else list(by_shapes())


def _fitting(found: Shapes, known: Mapping[str, Shapes], what: str) -> tuple[str, ...]:
    fitting = tuple(name for name, shapes in known.items() if shapes == found)
    if fitting:
        return fitting
    closest = max(known, key=lambda name: len(known[name].items() & found.items()))
    raise UserError(
        f"the checkpoint fits no published {what}; the nearest is {closest}, but {difference(found, known[closest])}: "
        "name the original's arguments instead.",
        key=first_difference(found, known[closest]),
        code="unknown",
    )
