"""`carrara sample`: pictures from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carrara.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image
    from rich.progress import Progress
    from torch import Tensor

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
    small: Annotated[
        list[Path] | None,
        typer.Option("--small", help="Pictures, or folders of them, that MODEL, an up-sampler, enlarges. Repeatable."),
    ] = None,
    upsampler: Annotated[
        Path | None, typer.Option("--upsampler", help="An up-sampler that enlarges what MODEL makes.")
    ] = None,
    small_noise: Annotated[
        float | None,
        typer.Option("--small-noise", help="Noise on what is enlarged, 0 (unless said) up to what training had."),
    ] = None,
    upsampler_steps: Annotated[
        int | None, typer.Option("--upsampler-steps", help="Solver steps of the up-sampler.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option("--codec", help="A codec with MODEL's latents whose decoder learned on.")
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

    import torch

    from carrara import codecs
    from carrara.classifier import Classifier
    from carrara.cli.console import console, progress_bar
    from carrara.model import DiffusionModel

    _refuse_alone("--classifier-scale", classifier_scale, {"--classifier": classifier})
    _refuse_alone("--upsampler-steps", upsampler_steps, {"--upsampler": upsampler})
    _refuse_alone("--small-noise", small_noise, {"--small": small, "--upsampler": upsampler})
    base = DiffusionModel.load(model)
    base = base.with_codec(codecs.load(codec)) if codec else base
    enlarging = DiffusionModel.load(upsampler) if upsampler else None
    leading = Classifier.load(classifier) if classifier else None
    pictures = small_pictures(small, base.shape[0]) if small else None
    names = base.class_names(leading)
    labels, total = _asked(label, count, names, pictures)
    if enlarging is not None:  # before the base model works for it in vain
        enlarging.plan(
            labels if enlarging.class_labels else None,
            low_res=torch.zeros(max(1, len(labels or ())), *base.shape),
            noise_level=small_noise or 0.0,
        )
    folder = out or model / f"samples-seed{seed}"
    with progress_bar() as bar:
        bar.disable = json_output
        samples = base.sample(
            labels,
            total,
            steps=steps,
            solver=solver,
            guidance=guidance,
            rescale=rescale,
            classifier=leading,
            classifier_scale=1.0 if classifier_scale is None else classifier_scale,
            low_res=None if pictures is None else pictures[:total],
            noise_level=(small_noise or 0.0) if small else None,
            seed=seed,
            eta=eta,
            spacing=spacing,
            batch_size=batch_size,
            on_step=_reports(bar, "enlarging" if small else "sampling", total, batch_size),
        )
        if enlarging is not None:
            samples.save(folder / "base")
            samples = enlarging.sample(
                labels if enlarging.class_labels else None,
                total,
                low_res=samples.images,
                noise_level=small_noise or 0.0,
                steps=upsampler_steps,
                seed=seed,
                batch_size=batch_size,
                on_step=_reports(bar, "enlarging", total, batch_size),
            )
    samples.save(folder)
    if json_output:
        print(json.dumps({"folder": str(folder), "count": total, "labels": samples.labels, **samples.metadata}))
    else:
        console.print(f"{total} pictures in {folder}", highlight=False)


def _refuse_alone(word: str, value: object, owners: dict[str, object]) -> None:
    """An option that changes what another one asks for does nothing without it, which is said."""
    if value is not None and not any(owners.values()):
        raise UserError(f"{word} is given, but {' or '.join(owners)} is not: add it, or leave this out.")


def _asked(
    label: list[str] | None, count: int | None, names: tuple[str, ...] | None, small: Tensor | None
) -> tuple[list[str | int] | None, int]:
    """The class of every picture, None where none is told, and how many pictures."""
    if small is not None:
        if names is not None and not label:
            raise UserError("this up-sampler is told a class: give --label, one for all pictures or one for each.")
        count = len(small) if count is None else count
        if count > len(small):
            raise UserError(f"--count {count} is more than the {len(small)} small pictures: leave it out, or add some.")
    labels: list[str | int] | None = list(label) if label else None
    if count is None:
        every = 0 if names is None else len(names)
        count = len(labels) if labels and names is not None else max(16, every)
    if count < 1:
        raise UserError("--count must be at least 1.")
    if names is not None:
        known = labels or list(range(len(names)))
        labels = [known[row % len(known)] for row in range(count)]
    return labels, count


def _reports(bar: Progress, name: str, total: int, batch_size: int) -> Callable[[Step, int], None]:
    """What shows each step on a bar."""
    task = bar.add_task(name, total=total, note="")

    def on_step(step: Step, low: int) -> None:
        done = low + min(batch_size, total - low) * (step.index + 1) / step.total
        bar.update(task, completed=round(done), note=f"t = {step.time:g}")

    return on_step


def small_pictures(places: list[Path], channels: int) -> Tensor:
    """The pictures of files, folders and data sets, in their order, float32 [N, C, h, w] in [-1, 1].

    Raises:
        UserError: one cannot be read, or they are of several sizes.
    """
    import torch

    from carrara.data import Preprocess
    from carrara.data.batches import normalised

    names: list[str] = []
    found: list[Tensor] = []
    for name, image, levels in (one for place in places for one in _images(place)):
        pixels = Preprocess(image.height, image.width, channels)(image)
        names.append(name)
        found.append(normalised(pixels.numpy(), levels))
        if found[-1].shape != found[0].shape:
            first, last = (f"{image.shape[2]}×{image.shape[1]}" for image in (found[0], found[-1]))
            raise UserError(
                f"{names[0]} is {first} and {name} is {last}: an up-sampler enlarges pictures of one size, so bring "
                "them to it first."
            )
    return torch.stack(found)


def _images(place: Path) -> Iterator[tuple[str, Image.Image, int]]:
    """Name, picture and levels of a channel for each picture of a file, folder or data set."""
    from carrara.data import open_source
    from carrara.data.decode import IMAGE_SUFFIXES, UnreadablePicture, decode

    if place.suffix.lower() not in IMAGE_SUFFIXES:
        source = open_source(place)
        yield from ((example.name, example.image, source.levels) for example in source)
        return
    try:
        image, _ = decode(place.read_bytes())
    except (OSError, UnreadablePicture) as error:
        raise UserError(f"{place} cannot be read: {error}.") from None
    yield str(place), image, 256
