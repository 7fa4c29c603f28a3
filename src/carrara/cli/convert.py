"""`carrara import` and `carrara export`: checkpoints of other programs, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from carrara.errors import UserError


def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt or .safetensors file of guided- or improved-diffusion.")],
    out: Annotated[Path | None, typer.Option("--out", help="The model folder; CHECKPOINT's name unless said.")] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Which published model it is; by its shapes unless said.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An argument of the original constructor that the shapes do not tell, e.g. num_head_channels=64.",
        ),
    ] = None,
    schedule: Annotated[str, typer.Option("--schedule", help="With --set: linear or cosine.")] = "linear",
    steps: Annotated[int, typer.Option("--diffusion-steps", "--diffusion_steps", help="With --set: T.")] = 1000,
    rescaled: Annotated[
        bool, typer.Option("--rescale-timesteps", "--rescale_timesteps", help="With --set: told t·1000/T.")
    ] = False,
    check: Annotated[
        Path | None, typer.Option("--check", help="An .npz of the original's x, t, (y, low_res) and out, to compare.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a checkpoint into a model folder, with a report of its parity."""
    from carrara.convert import check_outputs, import_guided_diffusion
    from carrara.recipe import override

    folder = out or checkpoint.with_suffix("")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name another folder with --out.")
    imported = import_guided_diffusion(
        checkpoint,
        name,
        arguments=override({}, assignments or []),
        schedule=schedule,
        steps=steps,
        rescaled_time=rescaled,
    )
    report = imported.report
    if check is not None:
        report = {**report, "check": check_outputs(imported.model, check)}
    imported.model.save(folder)
    _tell({"folder": str(folder), **report}, json_output)
    if check is not None and not report["check"]["equal"]:
        raise typer.Exit(1)


def export(
    model: Annotated[Path, typer.Argument(help="A run, or a model or classifier folder.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, .pt or .safetensors.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model or classifier as guided-diffusion reads it, and the arguments of its constructor beside it."""
    from carrara.classifier import Classifier
    from carrara.convert import export_guided_diffusion
    from carrara.model import DiffusionModel
    from carrara.weights import kind_of

    loaded = Classifier.load(model) if kind_of(model) == "classifier" else DiffusionModel.load(model)
    _tell({"file": str(out), **export_guided_diffusion(loaded, out)}, json_output)


def _tell(report: dict[str, Any], json_output: bool) -> None:
    import json

    from carrara.cli.console import console, table

    if json_output:
        print(json.dumps(report))
        return
    flat: dict[str, Any] = {}
    for key, value in report.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key.replace('_', ' ')} {name}".strip(): _words(part) for name, part in inner.items()}
    console.print(table(flat))


def _words(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
