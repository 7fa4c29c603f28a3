"""`carrara recipes`: what comes with Carrara."""

from __future__ import annotations

from typing import Annotated

import typer

from carrara.errors import UserError


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe in full.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes; extensions add their kinds.")
    ] = False,
) -> None:
    """List the shipped recipes, or print one: a start for your own."""
    import json

    from carrara.recipe import json_schema, load, shipped

    if schema and name is not None:
        raise UserError(
            f"--schema is of all recipes: leave out {name}, or leave out --schema.", key="schema", code="conflict"
        )
    if schema:
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return
    if name is not None:
        print(load(name).to_yaml(), end="")
        return
    for known in shipped():
        recipe = load(known)
        side = "×".join(map(str, recipe.data.resolution))
        size = f"{side} pixels, {recipe.data.channels} channels"
        print(f"{known:18} {recipe.kind:10}  {size}, {recipe.training.steps:,} steps")
