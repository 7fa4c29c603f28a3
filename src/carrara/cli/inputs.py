"""Options for what models are conditioned on: one for each input that a registered conditioner declares."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from carrara.errors import UserError

if TYPE_CHECKING:
    from carrara.conditioning import Input

PANEL = "Conditioning"
_TYPES: dict[str, Any] = {"class": str, "text": str, "number": float, "image": Path}
_MORE = {"image": " A picture, or a folder of them.", "number": "", "text": "", "class": ""}


class WithInputs(TyperCommand):
    """A command with the options of the registered conditioners, extensions' included; they go to `given_inputs`."""

    without: frozenset[str] = frozenset()

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own options, and those of the inputs."""
        own = super().get_params(ctx)
        added = _options(tuple(declared for declared in _declared() if declared.name not in self.without))
        for option in added:
            taken = {flag for param in own for flag in param.opts} & set(option.opts)
            if taken:
                raise UserError(
                    f"the input '{option.name}' of a conditioner needs the option {min(taken)}, which this command has "
                    "already: rename the input, or give it other flags.",
                    key=str(option.name),
                    code="conflict",
                )
        return [*own[:-1], *added, *own[-1:]]  # --help stays the last


class Sampling(WithInputs):
    """Options of everything but low-resolution images, which `carrara upscale` enlarges."""

    without = frozenset({"low_res", "noise_level"})


class Upscaling(WithInputs):
    """Options of everything but the pictures themselves, which are arguments."""

    without = frozenset({"low_res"})


def given_inputs(context: typer.Context) -> dict[str, Any]:
    """The inputs that were typed, by name: a list of an input that has one value for each picture."""
    found: dict[str, Any] = context.meta.get(__name__, {})
    return found


def _declared() -> Iterator[Input]:
    """The inputs of all registered conditioners, each name once."""
    from carrara.conditioning import KINDS

    known: dict[str, Input] = {}
    for conditioner in KINDS.values():
        for declared in getattr(conditioner, "declared", ()):
            known.setdefault(declared.name, declared)
    return iter(known.values())


@cache
def _options(inputs: tuple[Input, ...]) -> list[Any]:
    """An option for each input."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def command(**values: Any) -> None: ...

    parameters = []
    for declared in inputs:
        one: Any = _TYPES[declared.type]
        value: Any = list[one] | None if declared.per_sample else one | None
        flags = declared.flags or (f"--{declared.name.replace('_', '-')}",)
        about = declared.about[0].upper() + declared.about[1:] + "." + _MORE[declared.type]
        repeated = " Repeatable; --count repeats the list." if declared.per_sample else ""
        option = typer.Option(*flags, help=about + repeated, rich_help_panel=PANEL, callback=_keep)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(declared.name, kind, annotation=Annotated[value, option], default=None))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    options = [param for param in typer.main.get_command(app).params if param.name != "help"]
    for option in options:
        option.expose_value = False
    return options


def _keep(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    if value not in (None, [], ()):
        context.meta.setdefault(__name__, {})[param.name] = list(value) if isinstance(value, tuple | list) else value
    return value
