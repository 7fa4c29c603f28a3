"""The layouts of others, one row each, and the two ways through the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from carrara import loading
from carrara.classifier import Classifier
from carrara.codecs import DiscreteAutoencoder, KLAutoencoder, LearnedCodec, VQAutoencoder
from carrara.convert import compvis, diffusers, guided_diffusion
from carrara.convert.imported import Contents, Convertible, Hints, Imported, refuse_foreign
from carrara.errors import UserError, nearest
from carrara.model import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One program's way to lay out a model.

    Attributes:
        name: the word for it.
        folder: a model is a folder, not a file.
        config: of a file, the ending of the config that is written with it.
        takes: the entries of `Hints` that mean something to it.
        fits: whether some contents are laid out so.
        read: contents as a model.
        holds: whether it is the natural layout of a model, the table's first of its kind being taken.
        write: a model to a path, and the report.
    """

    name: str
    folder: bool = False
    config: str = ".yaml"
    takes: frozenset[str] = frozenset()
    fits: Callable[[Contents], bool]
    read: Callable[[Contents, Hints], Imported]
    holds: Callable[[Convertible], bool]
    write: Callable[[Convertible, Path], dict[str, Any]]


def _of_pixels(model: Convertible) -> bool:
    return isinstance(model, Classifier) or (isinstance(model, DiffusionModel) and model.codec.bounded)


_CONFIGURED = frozenset({"name", "arguments", "config"})

LAYOUTS = (
    Layout(
        name="guided-diffusion",
        config=".json",
        takes=frozenset({"name", "arguments", "schedule", "diffusion_steps", "rescaled_time"}),
        fits=guided_diffusion.is_guided_diffusion,
        read=guided_diffusion.import_guided_diffusion,
        holds=_of_pixels,
        write=guided_diffusion.export_guided_diffusion,
    ),
    Layout(
        name="taming",
        takes=_CONFIGURED,
        fits=lambda contents: compvis.is_first_stage(contents) and compvis.quantises(contents),
        read=compvis.import_compvis,
        holds=lambda model: isinstance(model, VQAutoencoder | DiscreteAutoencoder),
        write=compvis.export_taming,
    ),
    Layout(
        name="compvis",
        takes=_CONFIGURED | {"last_weights"},
        fits=lambda contents: compvis.is_first_stage(contents) or compvis.is_whole(contents),
        read=compvis.import_compvis,
        holds=lambda model: isinstance(model, KLAutoencoder | DiffusionModel),
        write=compvis.export_compvis,
    ),
    Layout(
        name="diffusers",
        folder=True,
        fits=diffusers.is_diffusers,
        read=diffusers.import_diffusers,
        holds=lambda model: isinstance(model, KLAutoencoder | VQAutoencoder | DiscreteAutoencoder | DiffusionModel),
        write=diffusers.export_diffusers,
    ),
)
"""In the order in which they are tried."""

OPTIONS = {
    "name": "--as",
    "arguments": "--set",
    "config": "--config",
    "schedule": "--schedule",
    "diffusion_steps": "--diffusion-steps",
    "rescaled_time": "--rescale-timesteps",
    "last_weights": "--last-weights",
}
"""What the entries of `Hints` are called on the command line."""


def import_model(path: str | Path, hints: Hints | None = None) -> Imported:
    """A model of another program, whose layout is recognised by its keys, or by its folder's config.

    Args:
        path: a weight file (read, never run), or a folder of diffusers.
        hints: what its contents do not specify.

    Returns:
        The model, and a report that begins with its `layout`.

    Raises:
        UserError: no layout fits, a hint means nothing to it, or it cannot be read.
    """
    hints = hints or Hints()
    contents = Contents.of(path, last=hints.last_weights)
    layout = next((layout for layout in LAYOUTS if layout.fits(contents)), None)
    if layout is None:
        raise UserError(_unknown(contents), key=str(path), code="unsupported")
    chosen = {"weights": contents.taken, "not_taken": contents.others} if contents.others else {}
    if contents.others:
        hints = replace(hints, last_weights=False)  # the choice is made
    for entry in fields(Hints):
        if getattr(hints, entry.name) and entry.name not in layout.takes:
            raise UserError(
                f"{OPTIONS[entry.name]} means nothing to {path}, in the layout {layout.name}: leave it out.",
                key=OPTIONS[entry.name],
                code="conflict",
            )
    imported = layout.read(contents, hints)
    return Imported(imported.model, {"layout": layout.name, **chosen, **imported.report})


def _unknown(contents: Contents) -> str:
    if "format" in contents.config:
        return f"{contents.path} is a folder of Carrara already: there is nothing to import."
    if contents.config:
        return f"{contents.path} is a folder of no program whose models can be imported."
    if any(".resnets." in key or key.startswith("down_blocks.") for key in contents.tensors):
        return f"{contents.path} holds weights of diffusers, whose config is in their folder: name the folder instead."
    first = next(iter(contents.tensors))
    names = ", ".join(layout.name for layout in LAYOUTS)
    return f"{contents.path} fits no known layout ({names}): its first key is '{first}'."


def export_model(model: Convertible, path: str | Path, layout: str | None = None) -> dict[str, Any]:
    """Write a model as another program reads it.

    Args:
        model: a diffusion model, a classifier or a codec.
        path: a file's name, or without an ending a folder's.
        layout: one of `LAYOUTS`; the natural one for the model and the path where it is left out.

    Returns:
        The report, which begins with the `layout`.

    Raises:
        UserError: the layout is unknown, or cannot express the model.
    """
    path = Path(path)
    known = {row.name: row for row in LAYOUTS}
    if layout is not None and layout not in known:
        raise UserError(f"there is no layout '{layout}': {nearest(layout, known)}", key="layout", code="unknown")
    folder = path.suffix == ""
    natural = next((row for row in LAYOUTS if row.folder == folder and row.holds(model)), None)
    chosen = natural if layout is None else known[layout]
    if chosen is None:
        if not any(row.holds(model) for row in LAYOUTS):
            raise UserError(
                "no other program has such a model: copy its own folder, which Carrara reads.",
                key="layout",
                code="unsupported",
            )
        raise UserError(
            f"no layout of a folder can hold this model: name a file, such as {path}.safetensors.",
            key="out",
            code="unsupported",
        )
    for conditioner in model.conditioners if isinstance(model, DiffusionModel) else ():
        if conditioner.kind not in ("labels", "low_res"):
            raise UserError(
                f"the layout {chosen.name} has no place for conditioning on {conditioner.kind}: copy the model's own "
                "folder, which Carrara reads.",
                key="conditioners",
                code="unsupported",
            )
    if not chosen.folder:
        refuse_foreign(path, path.with_suffix(chosen.config))
    return {"layout": chosen.name, **chosen.write(model, path)}


def load(path: str | Path) -> Convertible:
    """A run's model, a model's folder, a classifier's or a codec's, whatever is there.

    Raises:
        UserError: it is nothing that Carrara saved, or nothing that can be written elsewhere.
    """
    model = loading.load(path)
    if not isinstance(model, DiffusionModel | Classifier | LearnedCodec):
        raise UserError(
            f"{path} contains a codec of the kind '{model.kind}', which no other program has.",
            key=str(path),
            code="unsupported",
        )
    return model
