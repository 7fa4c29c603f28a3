"""Continuing a run from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from carrara import codecs
from carrara.codecs import Codec
from carrara.errors import UserError
from carrara.recipe import ClassifierRecipe, DiffusionRecipe, Recipe
from carrara.training.state import put_optimiser, put_weights


def check(
    state: Mapping[str, Any], recipe: Recipe, folder: Path, class_names: Sequence[str], codec: Codec | None
) -> None:
    """Raises UserError where a checkpoint is of another length, of other classes or of another codec.

    Args:
        state: of the checkpoint.
        folder: of the run, for the messages.
        class_names: of the data.
        codec: whose latents the run works in, if any.
    """
    _check_classes(state, recipe, folder, class_names)
    if state["step"] > recipe.training.steps:
        raise UserError(
            f"{folder} has been trained for {state['step']} steps, more than training.steps={recipe.training.steps}: "
            f"set it to {state['step']} or more, or name another --out.",
            key="training.steps",
            code="conflict",
        )
    if state.get("codec") and codec is not None:
        before = state["codec"]
        codecs.check_same(codec, before["kind"], before["hash"], f"the run {folder}")


def check_data(
    state: Mapping[str, Any], data: Mapping[str, int | str], folder: Path, accept_changes: bool
) -> Iterator[str]:
    """A sentence where the data are others than a checkpoint's, and that is accepted.

    Args:
        state: of the checkpoint; the first edition's do not have the data's identity.
        data: the `identity` of the data.
        folder: of the run, for the messages.
        accept_changes: resume nevertheless.

    Raises:
        UserError: they are others, and that is not accepted.
    """
    before = state.get("data") or {}
    changed = [key for key, value in before.items() if data.get(key) != value]
    if not changed:
        return
    counts = {key: f" ({before[key]:,} then, {data[key]:,} now)" for key in changed if isinstance(before[key], int)}
    what = ", ".join(key + counts.get(key, "") for key in changed)
    sentence = f"the data of {folder} changed since step {state['step']} in the {what}"
    if not accept_changes:
        raise UserError(
            f"{sentence}: bring them back, or pass --accept-changes to resume with the data as they are.",
            key="data.path",
            code="mismatch",
        )
    yield f"{sentence}."


def restore(
    state: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, Optimizer],
    folder: Path,
) -> None:
    """Fill modules and optimisers from a checkpoint.

    Raises:
        UserError: it lacks one of them, or holds other shapes.
    """
    try:
        for name, module in modules.items():
            put_weights(module, weights[name])
        for name, optimiser in optimisers.items():
            put_optimiser(optimiser, state["optimisers"][name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint of step {state['step']} in {folder} does not fit this recipe (Carrara "
            f"{state.get('carrara')} wrote it): name another --out. {str(error).splitlines()[0]}",
            key="out",
            code="mismatch",
        ) from None


def changes(state: Mapping[str, Any], setting: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for everything in the setting that differs from the checkpoint's."""
    for key, before in state.get("setting", {}).items():
        if before != setting[key]:
            yield f"the checkpoint was made with {key} {before}, this is {setting[key]}: bits may differ."


def _check_classes(state: Mapping[str, Any], recipe: Recipe, folder: Path, class_names: Sequence[str]) -> None:
    """Only where the run trains on classes; the first edition's checkpoints do not hold them."""
    before, now = state.get("classes"), list(class_names)
    trained = isinstance(recipe, ClassifierRecipe) or (
        isinstance(recipe, DiffusionRecipe) and recipe.conditioning.kind != "none"
    )
    if not trained or before is None or before == now:
        return
    place = next((i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        what = f"{len(before)} classes, and the data now have {len(now)}"
    else:
        what = f"class {place} as '{before[place]}', which is '{now[place]}' in the data now"
    raise UserError(
        f"{folder} was trained with {what}: bring the data back, or train in another --out with start: {folder}, "
        "which maps classes by their names.",
        key="data.path",
        code="mismatch",
    )
