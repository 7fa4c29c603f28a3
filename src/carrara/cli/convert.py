"""`carrara import` and `carrara export`: models of other programs, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from carrara.errors import UserError


def import_(
    path: Annotated[
        Path,
        typer.Argument(
            help="A .pt, .ckpt or .safetensors file of guided- or improved-diffusion, latent diffusion, Stable "
            "Diffusion or taming-transformers; or a folder of diffusers."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to write; beside PATH, and after its name, unless said.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Which published model it is; by its shapes unless said.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An argument of the original constructor that the shapes do not tell, e.g. num_head_channels=64; of "
            "latent diffusion in the words of its config, e.g. unet_config.params.num_heads=8.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The original's YAML config (latent diffusion, taming); PATH's name with .yaml."),
    ] = None,
    last: Annotated[
        bool, typer.Option("--last-weights", help="Of latent diffusion: the last weights, not their running mean.")
    ] = False,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="Of guided-diffusion, with --set: linear (unless said) or cosine.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--diffusion-steps", "--diffusion_steps", help="Of guided-diffusion, with --set: T (1000)."),
    ] = None,
    rescaled: Annotated[
        bool,
        typer.Option(
            "--rescale-timesteps", "--rescale_timesteps", help="Of guided-diffusion, with --set: told t·1000/T."
        ),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", help="An .npz of the original's x, t, (y, low_res) and out, to compare; of a codec x, out."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a model of another program into a model or codec folder, with a report of its parity."""
    from carrara.cli.console import working
    from carrara.convert import Asked, check_outputs, import_model, refuse_taken
    from carrara.recipe import override

    if steps is not None and steps < 1:
        raise UserError(f"--diffusion-steps is {steps}: it must be at least 1.", key="diffusion_steps")
    beside = path.resolve().with_name(f"{path.resolve().name}-carrara") if path.is_dir() else path.with_suffix("")
    folder = out or beside
    refuse_taken(folder)  # before a large checkpoint is read in vain
    asked = Asked(name, override({}, assignments or []), config, schedule, steps, rescaled, last)
    with working("importing", json_output):
        imported = import_model(path, asked)
    report = imported.report
    if check is not None:
        report = {**report, "check": check_outputs(imported.model, check)}
    imported.save(folder)
    _tell({"folder": str(folder), **report}, json_output)
    if check is not None and not report["check"]["equal"]:
        raise typer.Exit(1)


def export(
    model: Annotated[Path, typer.Argument(help="A run, or a model, classifier or codec folder.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="The file to write (.pt, .ckpt or .safetensors), or without an ending the folder."),
    ],
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout", help="guided-diffusion, compvis, taming or diffusers; by what the model is unless said."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model, classifier or codec as another program reads it, with the config that this program needs."""
    from carrara.cli.console import working
    from carrara.convert import export_model, load

    with working("exporting", json_output):
        report = export_model(load(model), out, layout)
    _tell({"out": str(out), **report}, json_output)


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
