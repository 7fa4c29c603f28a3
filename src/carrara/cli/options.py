"""Options that several commands have, in one spelling; and which of them were typed."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

from carrara.errors import UserError

PANEL = "Sampling"
Words = str | None
Number = int | None
Real = float | None

Steps = Annotated[Number, Option(help="Solver steps.", rich_help_panel=PANEL)]
Solver = Annotated[Words, Option(help="ddpm, ddim, dpm++2m, …", rich_help_panel=PANEL)]
Guidance = Annotated[Real, Option(help="Classifier-free scale; 1: none.", rich_help_panel=PANEL)]
Classifier = Annotated[
    Words, Option(help="A noisy classifier's run or folder, to guide toward the labels.", rich_help_panel=PANEL)
]
ClassifierScale = Annotated[Real, Option(help="Its scale; default: 1.", rich_help_panel=PANEL)]
Eta = Annotated[Real, Option(help="DDIM's η, 0..1.", rich_help_panel=PANEL)]
Spacing = Annotated[
    Words,
    Option(help="trailing, leading, linspace, quadratic, karras, log_snr or optimised.", rich_help_panel=PANEL),
]
Seed = Annotated[int, Option(help="Picture k is row k of this seed.", rich_help_panel=PANEL)]
BatchSize = Annotated[int, Option(help="Pictures computed at once.", min=1)]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, Option(help="auto, fp32, bf16 or fp16.")]

Reference = Annotated[Words, Option(help="Real images: a data set, folder, npz; or a statistics npz.")]
ReferenceSplit = Annotated[str, Option(help="Which part of the reference.")]
Features = Annotated[
    str, Option(help="pixels, inception=FILE (FID with the 2015 weights), clip=, dinov2=, classifier=FOLDER.")
]
Checksum = Annotated[Words, Option(help="The SHA-256 of an Inception file that is not one of 2015's.")]
Count = Annotated[
    Number,
    Option("--n", "-n", help="How many samples; default: all, of a model as many as real images, 10,000 at most."),
]
Resolution = Annotated[Words, Option(help="Bring images that are read to N or HxW.")]
Channels = Annotated[Number, Option(help="Bring images that are read to 1, 3 or 4 channels.")]
Resize = Annotated[str, Option(help="adm, bicubic, lanczos, box, nearest.")]
Train = Annotated[Words, Option(help="Training images, for memorisation.")]
TrainSplit = Annotated[str, Option(help="Which part of them.")]
Evaluator = Annotated[
    Words, Option(help="Predicts the samples' classes: svc, fitted to the reference, or a trained classifier.")
]
PerClass = Annotated[bool, Option("--per-class", help="The metrics of each class, too.")]
Classes = Annotated[
    Words,
    Option(help="Of samples: turn, or reference: in its proportions, the default where they are known."),
]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]


FAMILIAR = {
    "grid": "spacing",
    "guidance-rescale": "rescale",
    "negative-prompt": "negative",
    "guidance-scale": "guidance",
    "judge": "evaluator",
    "max-train-steps": "steps",
    "mixed-precision": "precision",
    "num-inference-steps": "steps",
    "output-dir": "out",
    "train-batch-size": "batch-size",
}
"""Options of other programs and of earlier releases, and ours."""


class Commands(TyperGroup):
    """The commands, which take the options of other programs, too: `--num_inference_steps 20` is `--steps 20`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell every option our way."""
        return super().parse_args(ctx, [_ours(word) for word in args])


def _ours(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("_", "-")
    return f"--{FAMILIAR.get(name, name)}{equals}{value}"


def typed(context: typer.Context) -> dict[str, Any]:
    """What the user typed, by the names of the command's parameters; `--json` aside, which changes no result."""
    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in context.params}
    return {
        name: context.params[name]
        for name, source in sources.items()
        if source == "COMMANDLINE" and name != "json_output"
    }


def moved(old: str, new: str) -> None:
    """Print to stderr that a spelling works for one more release."""
    from carrara.cli.console import errors

    errors.print(f"'{old}' still works in this release: use '{new}'.")


def refuse_others(option: str, given: dict[str, Any], allowed: set[str]) -> None:
    """Raises UserError where other options were typed than an old spelling takes."""
    others = sorted(f"--{name.replace('_', '-')}" for name in given.keys() - allowed)
    if others:
        raise UserError(f"{option} takes no {', '.join(others)}: leave it out.", key=option, code="conflict")
