"""Pictures from a trained model."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from carrara import weights
from carrara.app.events import Event, Notice, Saved, StepDone
from carrara.app.models import open_model
from carrara.app.pictures import read_pictures
from carrara.app.request import Request, check_folder
from carrara.app.stream import Report, streamed
from carrara.classifier import Classifier
from carrara.devices import resolve_device
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.sampling import Samples, replay
from carrara.solvers import Step

CHOICES = ("steps", "solver", "guidance", "rescale", "eta", "spacing", "seed")


class Draw(Request):
    """What sampling and upscaling have in common.

    Attributes:
        model: a run folder, or its model folder.
        out: where the pictures go; None is a new folder in the model's.
        overwrite: replace the samples in the folder.
        inputs: what the model's conditioners read, by name (`carrara.conditioning.Input`): a list of values, one for
            each picture, a shorter one being repeated; of images their paths. A class is a name, or a number where no
            class has that name.
        count: how many pictures.
        steps, solver, guidance, rescale, eta, spacing, seed: as of `DiffusionModel.sample`.
        codec: a codec whose decoder was fine-tuned, in place of the model's own.
        batch_size: pictures computed at once.
        device, precision: "auto", or as of `carrara.devices`.
    """

    model: Path
    out: Path | None = None
    overwrite: bool = False
    inputs: dict[str, Any] = Field(default_factory=dict)
    count: int | None = Field(None, ge=1)
    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    rescale: float = 0.0
    eta: float | None = None
    spacing: str | None = None
    seed: int = 0
    codec: str | None = None
    batch_size: int = Field(64, ge=1)
    device: str = "auto"
    precision: str = "auto"

    @property
    def choices(self) -> dict[str, Any]:
        """The arguments of `DiffusionModel.sample`, inputs aside."""
        return {name: getattr(self, name) for name in CHOICES}


class SampleRequest(Draw):
    """Pictures of a model.

    Attributes:
        count: by default one per value of the longest input, else 16, or all classes in turn.
        classifier, classifier_scale: a noisy classifier's folder, to guide toward the labels.
        like: a picture to make again from its metadata; of a picture in a model's folder, `model` is that model.
    """

    classifier: Path | None = None
    classifier_scale: float = 1.0
    like: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _model_of_picture(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "model" in values or values.get("like") is None:
            return values
        folders = [folder for folder in Path(values["like"]).absolute().parents if weights.holds(folder)]
        return {**values, "model": folders[0]} if folders else values


def sample(request: SampleRequest) -> Iterator[Event]:
    """Sample, and save each picture with its metadata, a sheet of all, and `samples.npz`.

    Yields:
        The steps, then the `Saved` samples with their metadata.

    Raises:
        UserError: anything that does not fit, before the first step.
    """
    _refuse(request)
    device = resolve_device(request.device)
    precision = request.precision
    metadata = None if request.like is None else read_metadata(request.like)
    if metadata is not None and precision == "auto":
        precision = next((p for p in ("bf16", "fp16") if str(metadata.get("weights")).endswith(p)), "fp32")
    model = open_model(request.model, device, precision, request.codec)
    guide = None if request.classifier is None else Classifier.load(request.classifier, device)
    if metadata is None:
        names = model.class_names(guide)
        inputs, total = requested(request, model, names)
        yield from _by_name(request, names)
        arguments = {**request.choices, **inputs, "count": total, "classifier_scale": request.classifier_scale}
    else:
        arguments = _replayed(metadata, model, guide)
    arguments["classifier"] = guide
    model.plan(**arguments)  # refuses
    folder = samples_folder(request.out, request.model / f"samples-seed{request.seed}", request.overwrite)
    samples = yield from drawn(model, "sampling", arguments, request.batch_size)
    yield from saved(samples, folder, request.overwrite)


def _refuse(request: SampleRequest) -> None:
    given = request.model_fields_set
    if "classifier_scale" in given and request.classifier is None:
        raise UserError(
            "--classifier-scale belongs to --classifier: give both, or leave it out.",
            key="classifier_scale",
            code="conflict",
        )
    others = sorted([*request.inputs, *(given & {"count", "classifier_scale", *CHOICES})])
    if request.like is not None and others:
        raise UserError(
            f"--like takes {', '.join(others)} from the picture's metadata: leave it out.",
            key=others[0],
            code="conflict",
        )


def requested(
    request: Draw, model: DiffusionModel, names: tuple[str, ...] | None, most: int | None = None
) -> tuple[dict[str, Any], int]:
    """The inputs of every picture, and how many pictures.

    Args:
        names: the classes that pictures can have; all in turn where no label is given. None: no classes.
        most: the number of pictures where the request has none.

    Raises:
        UserError: an image that cannot be read.
    """
    declared = {one.name: one for conditioner in model.conditioners for one in conditioner.inputs}
    inputs = dict(request.inputs)
    lists = {name: value for name, value in inputs.items() if isinstance(value, list | tuple) and value}
    for name, value in lists.items():
        if name in declared and declared[name].type == "image":
            lists[name] = list(read_pictures([Path(path) for path in value], model.shape[0]))
    count = request.count or most or max(map(len, lists.values()), default=max(16, len(names or ())))
    if names is not None:
        lists.setdefault("labels", list(range(len(names))))
    for name, values in lists.items():
        rows = [values[row % len(values)] for row in range(count)]
        inputs[name] = torch.stack(rows) if isinstance(rows[0], Tensor) else rows
    return inputs, count


def _by_name(request: Draw, names: tuple[str, ...] | None) -> Iterator[Notice]:
    """Report which class is meant where a label is both a name and another class's number."""
    for label in dict.fromkeys(request.inputs.get("labels", ())):
        if (
            isinstance(label, str)
            and label.isdecimal()
            and names
            and label in names
            and names.index(label) != int(label)
        ):
            yield Notice(f"'{label}' is the class of this name, number {names.index(label)} of 0..{len(names) - 1}.")


def drawn(
    model: DiffusionModel, task: str, arguments: dict[str, Any], batch_size: int
) -> Generator[Event, None, Samples]:
    """The steps of sampling; returns the `Samples`."""
    result: list[Samples] = []
    total = int(arguments["count"])

    def work(report: Report) -> None:
        def on_step(step: Step, low: int) -> None:
            done = low + min(batch_size, total - low) * (step.index + 1) / step.total
            report(StepDone(task, int(done), total, f"t = {step.time:g}", step.prediction.x0))

        result.append(model.sample(**arguments, batch_size=batch_size, on_step=on_step))

    yield from streamed(work)
    return result[0]


# ---- where samples are saved ---------------------------------------------------------------------------------------


def samples_folder(out: Path | None, default: Path, overwrite: bool) -> Path:
    """A folder without samples, so that two sets are never mixed: `out`, or a new one named after `default`.

    Raises:
        UserError: `out` holds samples, or other files that `overwrite` would not replace, or cannot be written.
    """
    if out is None:
        numbered = (default.with_name(f"{default.name}-{number}") for number in range(2, 10**6))
        folder = default if overwrite or not _samples_in(default) else next(f for f in numbered if not _samples_in(f))
    else:
        folder = out
        if not overwrite and _samples_in(out):
            raise UserError(
                f"{out} holds samples already: name another --out, or replace them with --overwrite.",
                key="out",
                code="exists",
            )
        if out.is_dir() and any(out.iterdir()) and not _samples_in(out):
            raise UserError(
                f"{out} holds other files, among which pictures would be lost: name a new folder with --out.",
                key="out",
                code="exists",
            )
    check_folder(folder, "out")
    return folder


def _samples_in(folder: Path) -> list[Path]:
    """The files of `Samples.save`."""
    if not folder.is_dir():
        return []
    return [*folder.glob("seed*-*.png"), *(f for f in (folder / "grid.png", folder / "samples.npz") if f.is_file())]


def saved(samples: Samples, folder: Path, overwrite: bool) -> Iterator[Saved]:
    """Write the samples, in place of those that are there."""
    for old in _samples_in(folder) if overwrite else ():
        old.unlink()
    samples.save(folder)
    about = {"folder": str(folder), "count": len(samples.images), "labels": samples.labels, **samples.metadata}
    yield Saved("samples", folder, about)


# ---- the same picture again ---------------------------------------------------------------------------------------


def read_metadata(path: Path) -> dict[str, Any]:
    """How a saved picture was made.

    Raises:
        UserError: no picture, or none that `sample` wrote.
    """
    try:
        with Image.open(path) as picture:
            metadata = json.loads(picture.info.get("carrara", "null"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read: {error}.", key="like", code="missing") from None
    if not isinstance(metadata, dict) or "row" not in metadata:
        raise UserError(
            f"{path} does not contain the metadata of a single picture: give one that carrara sample wrote, as it is.",
            key="like",
            code="missing",
        )
    return metadata


def _replayed(metadata: dict[str, Any], model: DiffusionModel, guide: Classifier | None) -> dict[str, Any]:
    """The arguments that make the picture again.

    Raises:
        UserError: another model's or classifier's picture, metadata of a newer version, or that lack something.
    """
    arguments: dict[str, Any] = {}
    if guide is not None and "classifier" in metadata.get("needs", ()):
        metadata = {**metadata, "needs": [name for name in metadata["needs"] if name != "classifier"]}
        arguments["classifier_scale"] = metadata["classifier_scale"]
    arguments |= replay(metadata)
    origins: dict[str, tuple[Any, Any]] = {"model": (metadata["weights"], model.origin)}
    if guide is not None or "classifier" in metadata:
        origins["classifier"] = (metadata.get("classifier"), None if guide is None else guide.origin)
    for name, (then, now) in origins.items():
        if then != now:
            raise UserError(
                f"the picture was made with the {name} '{then}', and this is '{now}': give that {name}.",
                key=name,
                code="mismatch",
            )
    return arguments
