"""Larger pictures: an up-sampler's, of one's own pictures or of what a base model makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from carrara.app.events import Event
from carrara.app.models import open_model
from carrara.app.pictures import read_pictures
from carrara.app.sample import Draw, SampleRequest, drawn, requested, samples_folder, saved
from carrara.classifier import Classifier
from carrara.devices import resolve_device
from carrara.errors import UserError


class UpscaleRequest(Draw):
    """Pictures to enlarge.

    Attributes:
        pictures: files, and folders or data sets of pictures; of a folder that `sample` wrote, its samples.
        count: at most so many of them; None is all.
    """

    pictures: tuple[Path, ...]


class CascadeRequest(SampleRequest):
    """A base model's samples, enlarged before they are rounded to 8 bits."""

    upsampler: Path
    upsampler_steps: int | None = None


def upscale(request: UpscaleRequest) -> Iterator[Event]:
    """Enlarge pictures, and save them as `sample` does.

    Raises:
        UserError: pictures or a model that do not fit, before the first step.
    """
    device = resolve_device(request.device)
    model = open_model(request.model, device, request.precision, request.codec)
    low_res = read_pictures(request.pictures, model.shape[0])
    names = model.class_names()
    if names is not None and not request.inputs.get("labels"):
        raise UserError(
            "this up-sampler is conditioned on a class: give --label, one for all pictures or one for each.",
            key="labels",
            code="missing",
        )
    if request.count is not None and request.count > len(low_res):
        raise UserError(f"--count {request.count} is more than the {len(low_res)} pictures: leave it out.", key="count")
    inputs, count = requested(request, model, names, most=len(low_res))
    arguments = {**request.choices, "count": count, **inputs, "low_res": low_res[:count]}
    model.plan(**arguments)  # refuses
    folder = samples_folder(request.out, request.model / f"upscaled-seed{request.seed}", request.overwrite)
    samples = yield from drawn(model, "upscaling", arguments, request.batch_size)
    yield from saved(samples, folder, request.overwrite)


def cascade(request: CascadeRequest) -> Iterator[Event]:
    """Sample a base model and enlarge its samples; those are saved in the folder `base`."""
    device = resolve_device(request.device)
    base = open_model(request.model, device, request.precision, request.codec)
    upsampler = open_model(request.upsampler, device, request.precision)
    guide = None if request.classifier is None else Classifier.load(request.classifier, device)
    inputs, count = requested(request, base, base.class_names(guide))
    enlarging = {one.name for conditioner in upsampler.conditioners for one in conditioner.inputs}
    own = {name: value for name, value in inputs.items() if name in enlarging}
    second: dict[str, Any] = {**own, "count": count, "seed": request.seed, "steps": request.upsampler_steps}
    first = {**request.choices, **{k: v for k, v in inputs.items() if k == "labels" or k not in enlarging}}
    first |= {"count": count, "classifier": guide, "classifier_scale": request.classifier_scale}
    base.plan(**first)  # both refuse before anything is computed
    upsampler.plan(**second, low_res=torch.zeros(count, *base.shape))
    folder = samples_folder(request.out, request.model / f"samples-seed{request.seed}", request.overwrite)
    samples = yield from drawn(base, "sampling", first, request.batch_size)
    yield from saved(samples, folder / "base", request.overwrite)
    second["low_res"] = samples.images
    samples = yield from drawn(upsampler, "upscaling", second, request.batch_size)
    yield from saved(samples, folder, request.overwrite)
