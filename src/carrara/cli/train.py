"""`carrara train`: a shipped recipe, a recipe file, or a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carrara.errors import UserError

if TYPE_CHECKING:
    from carrara.training import Trainer


def train(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|FOLDER", help="A shipped recipe, a YAML file, or your images.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "--output_dir", help="The run folder [runs/NAME]."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, e.g. training.steps=500. Repeatable."),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option("--resolution", help="data.resolution: one side, or HEIGHTxWIDTH."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "--train_batch_size", help="training.batch_size."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--max_train_steps", help="training.steps."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--learning_rate", help="training.learning_rate."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", "--mixed_precision", help="training.precision: fp32 or bf16."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="seed.")] = None,
    resume: Annotated[
        str,
        typer.Option("--resume_from_checkpoint", help="Only 'latest', which is what happens anyway."),
    ] = "latest",
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the run folder's recipe differs.")
    ] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object per log interval.")] = False,
) -> None:
    """Train a model. To resume, run the same command again; Ctrl-C saves and stops."""
    from carrara.recipe import override, read, shipped, validate
    from carrara.training import Trainer
    from carrara.training.choose import recipe_for

    if resume != "latest":
        raise UserError(f"--resume_from_checkpoint {resume}: a run resumes from its newest whole checkpoint, 'latest'.")
    aliases = {
        "data.resolution": resolution and f"[{resolution.replace('x', ',')}]"
        if "x" in (resolution or "")
        else resolution,
        "training.batch_size": batch_size,
        "training.steps": steps,
        "training.learning_rate": learning_rate,
        "training.precision": precision,
        "seed": seed,
    }
    changes = [f"{key}={value}" for key, value in aliases.items() if value is not None] + list(assignments or [])
    path, reasons = Path(what), list[str]()
    if what in shipped() or path.suffix in (".yaml", ".yml"):
        data = read(what)
    elif path.exists():
        data, reasons = recipe_for(path, changes)
    else:
        raise UserError(
            f"{what} is neither a shipped recipe ({', '.join(shipped())}), nor a recipe file, nor a folder."
        )
    recipe = validate(override(data, changes), f"the recipe {what}")
    trainer = Trainer(recipe, out or Path("runs") / recipe.name, accept_changes)
    run(trainer, reasons, json_lines)


def run(trainer: Trainer, reasons: list[str], json_lines: bool = False) -> None:
    """Walk a trainer to its end, showing progress.

    Args:
        reasons: why the recipe was chosen, said first.
        json_lines: machine-readable lines in place of the bar.
    """
    import json

    from carrara.cli.console import console, progress_bar, table

    summary: dict[str, Any] = trainer.summary()
    if json_lines:
        print(json.dumps({"start": summary, "reasons": reasons, "run": str(trainer.run.folder)}), flush=True)
        for state in trainer.steps():
            if state.notice or state.step % trainer.recipe.training.log_every == 0 or state.step == state.total:
                print(json.dumps({k: v for k, v in state.__dict__.items() if v == v and v is not None}), flush=True)
    else:
        for reason in reasons:
            console.print(reason, highlight=False)
        console.print(table(summary))
        console.print(f"run folder: {trainer.run.folder}", highlight=False)
        with progress_bar() as bar:
            task = bar.add_task("training", total=trainer.recipe.training.steps, completed=trainer.step, note="")
            for state in trainer.steps():
                if state.notice:
                    bar.console.print(state.notice, highlight=False)
                else:
                    note = f"loss {state.loss:.4f}  {state.images_per_s:,.0f} images/s"
                    bar.update(task, completed=state.step, note=note)
    if trainer.stopped:
        message = f"stopped and saved at step {trainer.step}: run the same command again to go on."
        print(json.dumps({"stopped": trainer.step}) if json_lines else message)
        raise typer.Exit(130)
    if not json_lines:
        console.print(f"model: {trainer.run.model}", highlight=False)
