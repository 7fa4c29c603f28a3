"""`carrara sample` and `carrara upscale`: pictures from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from carrara.cli import options as o
from carrara.cli.inputs import given_inputs
from carrara.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from carrara.app.events import Event

Model = Annotated[
    Path | None,
    typer.Argument(help="A run folder, or its model folder; not needed with --like for a picture in it."),
]
Out = Annotated[Path | None, Option(help="Where the pictures go; default: a new folder in MODEL.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the samples in the folder.")]
Rescale = Annotated[
    float, Option(help="φ, 0..1: how much of the unguided contrast is restored.", rich_help_panel=o.PANEL)
]
Codec = Annotated[o.Words, Option(help="A codec with MODEL's latents whose decoder was fine-tuned.")]


def sample(
    context: typer.Context,
    model: Model = None,
    out: Out = None,
    overwrite: Overwrite = False,
    count: Annotated[
        int | None,
        Option("--count", "-n", help="How many pictures; default: one per input, else 16, or all classes in turn."),
    ] = None,
    like: Annotated[Path | None, Option(help="Make this picture again, from the metadata in its PNG.")] = None,
    steps: o.Steps = None,
    solver: o.Solver = None,
    guidance: o.Guidance = None,
    rescale: Rescale = 0.0,
    classifier: o.Classifier = None,
    classifier_scale: o.ClassifierScale = None,
    eta: o.Eta = None,
    spacing: o.Spacing = None,
    seed: o.Seed = 0,
    codec: Codec = None,
    batch_size: o.BatchSize = 64,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    small: Annotated[list[Path] | None, Option(hidden=True)] = None,
    small_noise: Annotated[float | None, Option(hidden=True)] = None,
    upsampler: Annotated[Path | None, Option(hidden=True)] = None,
    upsampler_steps: Annotated[int | None, Option(hidden=True)] = None,
    json_output: o.Json = False,
) -> None:
    """Make pictures: PNG files with their metadata inside, a grid, and samples.npz."""
    from carrara.app.sample import SampleRequest
    from carrara.app.sample import sample as events

    given = o.typed(context) | {"inputs": given_inputs(context)}
    if {"small", "small_noise", "upsampler", "upsampler_steps"} & given.keys():
        _enlarge(given, json_output)
        return
    _show(events(SampleRequest(**given)), json_output)


def upscale(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="An up-sampler's run or model folder.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders and data sets of them.")],
    out: Out = None,
    overwrite: Overwrite = False,
    count: Annotated[int | None, Option("--count", "-n", help="How many of them; default: all.")] = None,
    steps: o.Steps = None,
    solver: o.Solver = None,
    guidance: o.Guidance = None,
    rescale: Rescale = 0.0,
    eta: o.Eta = None,
    spacing: o.Spacing = None,
    seed: o.Seed = 0,
    codec: Codec = None,
    batch_size: o.BatchSize = 64,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    json_output: o.Json = False,
) -> None:
    """Enlarge pictures with an up-sampler: your own, or those that sample wrote."""
    from carrara.app.upscale import UpscaleRequest
    from carrara.app.upscale import upscale as events

    _show(events(UpscaleRequest(**o.typed(context), inputs=given_inputs(context))), json_output)


def _enlarge(given: dict[str, Any], json_output: bool) -> None:
    """The spellings of the last release."""
    from carrara.app.upscale import CascadeRequest, UpscaleRequest, cascade, upscale

    if "upsampler_steps" in given and "upsampler" not in given:
        raise UserError("--upsampler-steps belongs to --upsampler.", key="upsampler_steps", code="conflict")
    if "small_noise" in given:
        given["inputs"] = {**given["inputs"], "noise_level": given.pop("small_noise")}
    if "upsampler" in given:
        o.moved("sample --upsampler", "carrara sample, then carrara upscale")
        _show(cascade(CascadeRequest(**given)), json_output)
    elif "small" in given:
        o.moved("sample --small", "carrara upscale MODEL PICTURES")
        given["pictures"] = given.pop("small")
        _show(upscale(UpscaleRequest(**given)), json_output)
    else:
        raise UserError(
            "--small-noise is an option of carrara upscale: leave it out.", key="noise_level", code="conflict"
        )


def _show(events: Iterable[Event], json_output: bool) -> None:
    import json

    from carrara.app.events import Saved
    from carrara.cli.console import console, show

    last = [event for event in show(events, json_output) if isinstance(event, Saved)][-1]
    if json_output:
        print(json.dumps(last.about))
    else:
        console.print(f"{last.about['count']} pictures in {last.path}")
