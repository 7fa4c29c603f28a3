"""The commands and their words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carrara.cli import convert, data, data_encode, demo, ema, evaluate, inputs, recipes, sample, train
from carrara.cli.options import Commands

app = typer.Typer(
    cls=Commands,
    name="carrara",
    help="The whole life of a diffusion model: look at your images, train, sample, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("demo")(demo.demo)
data.app.command("encode")(data_encode.encode)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("sample", cls=inputs.Sampling)(sample.sample)
app.command("upscale", cls=inputs.Upscaling)(sample.upscale)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("sweep")(evaluate.sweep)
app.command("ema")(ema.ema)
app.command("import")(convert.import_)
app.command("export")(convert.export)
app.command("recipes")(recipes.recipes)


@app.callback(invoke_without_command=True)
def _start(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    extension: Annotated[
        list[Path] | None,
        typer.Option("--extension", help="A Python file of yours that registers networks or conditioners. Repeatable."),
    ] = None,
) -> None:
    if version:
        from carrara import __version__

        print(__version__)
        raise typer.Exit
    if extension:
        from carrara.extensions import load_extension

        for path in extension:
            load_extension(path)
