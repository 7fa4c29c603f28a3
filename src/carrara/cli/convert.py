"""`carrara import` and `carrara export`: models of other programs, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from carrara.app.events import Saved


Source = Annotated[
    Path,
    typer.Argument(
        help="A .pt, .ckpt or .safetensors file of guided- or improved-diffusion, latent diffusion, Stable Diffusion "
        "or taming-transformers; or a folder of diffusers."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="The folder to write; default: PATH without its ending, of a folder PATH-carrara."),
]
Name = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Which published model it is; default: found by its shapes.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An argument of the original constructor that its shapes leave open, e.g. num_head_channels=64; of latent "
        "diffusion an entry of its config, e.g. unet_config.params.num_heads=8.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="The original's YAML config (latent diffusion, taming); default: PATH with .yaml."),
]
Last = Annotated[
    bool, typer.Option("--last-weights", help="Of latent diffusion: the last weights, not their running mean.")
]
Schedule = Annotated[
    str | None, typer.Option("--schedule", help="Of guided-diffusion, with --set: linear (default) or cosine.")
]
Steps = Annotated[
    int | None,
    typer.Option("--diffusion-steps", "--diffusion_steps", help="Of guided-diffusion, with --set: T; default: 1000."),
]
RESCALED = "Of guided-diffusion, with --set: its network takes t·1000/T."
Rescaled = Annotated[bool, typer.Option("--rescale-timesteps", "--rescale_timesteps", help=RESCALED)]
Check = Annotated[
    Path | None,
    typer.Option("--check", help="An .npz of the original's x, t, (y, low_res) and out to compare; of a codec x, out."),
]
Layout = Annotated[
    str | None,
    typer.Option("--layout", help="guided-diffusion, compvis, taming or diffusers; default: by the kind of model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def import_(
    path: Source,
    out: Out = None,
    name: Name = None,
    assignments: Assignments = None,
    config: Config = None,
    last: Last = False,
    schedule: Schedule = None,
    steps: Steps = None,
    rescaled: Rescaled = False,
    check: Check = None,
    json_output: Json = False,
) -> None:
    """Turn a model of another program into a model or codec folder, with a report of its parity."""
    from carrara.app.convert import ImportRequest
    from carrara.app.convert import import_ as events
    from carrara.app.events import Saved
    from carrara.cli.console import show

    request = ImportRequest(
        path=path,
        out=out,
        name=name,
        arguments=tuple(assignments or ()),
        config=config,
        schedule=schedule,
        diffusion_steps=steps,
        rescaled_time=rescaled,
        last_weights=last,
        check=check,
    )
    for event in show(events(request), json_output):
        if isinstance(event, Saved):
            _print("folder", event, json_output)
            if not event.about.get("check", {"equal": True})["equal"]:
                raise typer.Exit(1)


def export(
    model: Annotated[Path, typer.Argument(help="A run, or a model, classifier or codec folder.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="The file to write (.pt, .ckpt or .safetensors), or without an ending the folder."),
    ],
    layout: Layout = None,
    json_output: Json = False,
) -> None:
    """Write a model, classifier or codec as another program reads it, with the config that this program needs."""
    from carrara.app.convert import ExportRequest
    from carrara.app.convert import export as events
    from carrara.app.events import Saved
    from carrara.cli.console import show

    for event in show(events(ExportRequest(model=model, out=out, layout=layout)), json_output):
        if isinstance(event, Saved):
            _print("out", event, json_output)


def _print(path: str, saved: Saved, json_output: bool) -> None:
    """Print where something was saved, under the name `path`, and the report."""
    import json

    from carrara.cli.console import console, table

    report = {path: str(saved.path), **saved.about}
    if json_output:
        print(json.dumps(report))
        return
    flat: dict[str, Any] = {}
    for key, value in report.items():
        for name, part in (value if isinstance(value, dict) else {"": value}).items():
            shown = ", ".join(map(str, part)) if isinstance(part, list | tuple) else part
            flat[f"{key.replace('_', ' ')} {name}".strip()] = shown
    console.print(table(flat))
