"""`carrara sample`: pictures from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from carrara.solvers import Step


def sample(
    model: Annotated[Path, typer.Argument(help="A run folder, or its model folder.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "--output_dir", help="Where the pictures go; MODEL/samples-seedN unless said."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="A class, by number or name. Repeatable; --count repeats the list."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            "-n",
            help="How many pictures; one per label unless said, 16 without labels, all classes in turn.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--num_inference_steps", help="Solver steps."),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option("--solver", help="ddpm, ddim, dpm++2m, …"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", "--guidance_scale", help="Classifier-free scale; 1 is the plain model."),
    ] = None,
    rescale: Annotated[
        float, typer.Option("--rescale", "--guidance_rescale", help="φ, 0..1: the plain model's contrast given back.")
    ] = 0.0,
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="A noisy classifier's run or folder, to lead to the labels.")
    ] = None,
    classifier_scale: Annotated[
        float | None, typer.Option("--classifier-scale", "--classifier_scale", help="Its scale; 1 unless said.")
    ] = None,
    upsampler: Annotated[
        Path | None, typer.Option("--upsampler", help="An up-sampler that enlarges what MODEL makes.")
    ] = None,
    upsampler_steps: Annotated[
        int | None, typer.Option("--upsampler-steps", help="Solver steps of the up-sampler.")
    ] = None,
    eta: Annotated[float | None, typer.Option("--eta", help="DDIM's η, 0..1.")] = None,
    spacing: Annotated[
        str | None,
        typer.Option("--spacing", help="trailing, leading, linspace, quadratic, karras, log_snr."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Picture k is row k of this seed.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures worked on at once.", min=1)] = 64,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make pictures: PNG files with their recipe inside, a grid, and samples.npz."""
    import json

    from carrara.classifier import Classifier
    from carrara.cli.console import console, progress_bar
    from carrara.errors import UserError
    from carrara.model import DiffusionModel

    for scale, source, name in (
        (classifier_scale, classifier, "--classifier-scale"),
        (upsampler_steps, upsampler, "--upsampler-steps"),
    ):
        if scale is not None and source is None:
            raise UserError(f"{name} is given, but {name.rsplit('-', 1)[0]} is not: add it, or leave this out.")
    diffusion = DiffusionModel.load(model)
    enlarging = DiffusionModel.load(upsampler) if upsampler else None
    leading = Classifier.load(classifier) if classifier else None
    known = diffusion.labels.names if diffusion.labels else leading.names if leading else None
    labels: list[str | int] | None = list(label) if label else None
    if known is not None:
        labels = labels or list(range(len(known)))
        wanted = count if count is not None else (len(labels) if label else max(16, len(labels)))
        labels = [labels[i % len(labels)] for i in range(wanted)]
    total = len(labels) if labels is not None and known is not None else (16 if count is None else count)
    if total < 1:
        raise UserError("--count must be at least 1.")
    folder = out or model / f"samples-seed{seed}"
    with progress_bar() as bar:
        bar.disable = json_output

        def reports(name: str) -> Callable[[Step, int], None]:
            task = bar.add_task(name, total=total, note="")

            def on_step(step: Step, low: int) -> None:
                done = low + min(batch_size, total - low) * (step.index + 1) / step.total
                bar.update(task, completed=round(done), note=f"t = {step.time:g}")

            return on_step

        samples = diffusion.sample(
            labels,
            total,
            steps=steps,
            solver=solver,
            guidance=guidance,
            rescale=rescale,
            classifier=leading,
            classifier_scale=1.0 if classifier_scale is None else classifier_scale,
            seed=seed,
            eta=eta,
            spacing=spacing,
            batch_size=batch_size,
            on_step=reports("sampling"),
        )
        if enlarging is not None:
            samples.save(folder / "base")
            samples = enlarging.sample(
                labels if enlarging.labels else None,
                total,
                small=samples.images,
                steps=upsampler_steps,
                seed=seed,
                batch_size=batch_size,
                on_step=reports("enlarging"),
            )
    samples.save(folder)
    if json_output:
        print(json.dumps({"folder": str(folder), "count": total, "labels": samples.labels, **samples.protocol}))
    else:
        console.print(f"{total} pictures in {folder}", highlight=False)
