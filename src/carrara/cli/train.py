"""`carrara train`: a shipped recipe, a recipe file, or a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carrara.errors import UserError

if TYPE_CHECKING:
    from carrara.recipe import Recipe
    from carrara.training import Trainer


def train(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|FOLDER", help="A shipped recipe, a YAML file, or your images.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "--output_dir", help="The run folder; runs/NAME unless said."),
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
        typer.Option("--precision", "--mixed_precision", help="training.precision: fp32, bf16 or fp16."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="seed.")] = None,
    resume: Annotated[
        str,
        typer.Option("--resume_from_checkpoint", help="Only 'latest', which is what happens anyway."),
    ] = "latest",
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the run folder's recipe differs.")
    ] = False,
    overfit: Annotated[
        bool, typer.Option("--overfit-one-batch", help="Self-test: can this recipe learn one batch by heart?")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Self-test: where does the time of a step go?")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object per log interval.")] = False,
) -> None:
    """Train a model. To resume, run the same command again; Ctrl-C saves and stops."""
    from carrara import distributed
    from carrara.training import Trainer

    if resume != "latest":
        raise UserError(f"--resume_from_checkpoint {resume}: a run resumes from its newest whole checkpoint, 'latest'.")
    aliases = {
        "data.resolution": f"[{resolution.replace('x', ',')}]" if resolution and "x" in resolution else resolution,
        "training.batch_size": batch_size,
        "training.steps": steps,
        "training.learning_rate": learning_rate,
        "training.precision": precision,
        "seed": seed,
    }
    changes = [f"{key}={value}" for key, value in aliases.items() if value is not None]
    recipe, reasons = _recipe(what, changes + list(assignments or []))
    if overfit or profile:
        self_test(recipe, overfit, profile, json_lines)
        return
    trainer = Trainer(recipe, out or Path("runs") / recipe.name, accept_changes)
    try:
        run(trainer, reasons, json_lines)
    finally:
        distributed.finish()


def _recipe(what: str, changes: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe for what was named, with its changes, and why it was chosen where it was made for a folder."""
    from carrara.recipe import override, read, shipped, validate
    from carrara.training.choose import recipe_for

    path, reasons = Path(what), list[str]()
    if what in shipped() or path.suffix in (".yaml", ".yml"):
        data = read(what)
    elif path.exists():
        data, reasons = recipe_for(path, changes)
    else:
        raise UserError(
            f"{what} is neither a shipped recipe ({', '.join(shipped())}), nor a recipe file, nor a folder."
        )
    return validate(override(data, changes), f"the recipe {what}"), reasons


def self_test(recipe: Recipe, overfit: bool, profile: bool, json_lines: bool) -> None:
    """The self-tests that were asked for, in a folder that is thrown away.

    Raises:
        typer.Exit: with 1, where the recipe cannot learn one batch by heart.
    """
    import json
    import tempfile

    from carrara.cli.console import console, table
    from carrara.training import Trainer
    from carrara.training.selftest import GOAL, overfit_one_batch, profile_steps

    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if profile:
            told["profile"] = profile_steps(Trainer(recipe, Path(folder) / "profile"))
        if overfit:
            walk = list(overfit_one_batch(Trainer(recipe, Path(folder) / "overfit")))
            step, share = walk[-1]
            told["overfit"] = {"steps": step, "loss_share": share, "passed": share <= GOAL}
    if json_lines:
        print(json.dumps(told), flush=True)
    elif profile:
        rows = told["profile"]
        console.print(table({k: v for k, v in rows.items() if not isinstance(v, dict)}))
        for title in ("shares", "operations"):
            console.print(table({name: f"{share:.1%}" for name, share in rows[title].items()}))
    if overfit:
        verdict = "learned by heart" if told["overfit"]["passed"] else "NOT learned: mend the recipe before you train"
        if not json_lines:
            console.print(f"one batch: {verdict} (loss at {share:.1%} of its start after {step} steps)")
        raise typer.Exit(0 if told["overfit"]["passed"] else 1)


def run(trainer: Trainer, reasons: list[str], json_lines: bool = False) -> None:
    """Walk a trainer to its end, showing progress.

    Args:
        reasons: why the recipe was chosen, said first.
        json_lines: machine-readable lines in place of the bar.
    """
    import json
    import sys

    from carrara.cli.console import console, progress_bar, table

    summary: dict[str, Any] = trainer.summary()
    if not trainer.processes.first:  # the first speaks for all
        for state in trainer.steps():
            if state.notice and state.notice not in trainer.notices:  # what only this process has met
                print(f"carrara, process {trainer.processes.rank}: {state.notice}", file=sys.stderr, flush=True)
        return
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
                    bar.console.print(f"! {state.notice}", style="yellow", highlight=False, markup=False)
                else:
                    note = f"loss {state.loss:.4f}  {state.images_per_s:,.0f} images/s"
                    bar.update(task, completed=state.step, note=note)
    if trainer.stopped:
        message = f"stopped and saved at step {trainer.step}: run the same command again to go on."
        print(json.dumps({"stopped": trainer.step}) if json_lines else message)
        raise typer.Exit(130)
    if not json_lines:
        console.print(f"model: {trainer.run.model}", highlight=False)
