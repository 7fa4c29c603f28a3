"""Larger pictures: an up-sampler's, of one's own pictures or of what a base model makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from carrara.app.events import Event
from carrara.app.models import open_model
from carrara.app.sample import Draw, SampleRequest, drawn, requested, samples_folder, saved
from carrara.classifier import Classifier
from carrara.data import Preprocess, open_source
from carrara.data.batches import normalised
from carrara.data.decode import IMAGE_SUFFIXES, UnreadablePicture, decode
from carrara.devices import resolve_device
from carrara.errors import UserError


class UpscaleRequest(Draw):
    """Pictures to enlarge.

    Attributes:
        pictures: files, and folders or data sets of pictures; of a folder that `sample` wrote, its samples.
        noise_level: noise on the pictures, from 0 (trust every pixel; the default) to what training had.
        count: at most so many of them; None is all.
    """

    pictures: tuple[Path, ...]
    noise_level: float | None = None


class CascadeRequest(SampleRequest):
    """A base model's samples, enlarged before they are rounded to 8 bits."""

    upsampler: Path
    upsampler_steps: int | None = None
    noise_level: float | None = None


def upscale(request: UpscaleRequest) -> Iterator[Event]:
    """Enlarge pictures, and save them as `sample` does.

    Raises:
        UserError: pictures or a model that do not fit, before the first step.
    """
    device = resolve_device(request.device)
    model = open_model(request.model, device, request.precision, request.codec)
    low_res = read_pictures(request.pictures, model.shape[0])
    names, count = model.class_names(), request.count or len(low_res)
    if names is not None and not request.labels:
        raise UserError(
            "this up-sampler is conditioned on a class: give --label, one for all pictures or one for each.",
            key="labels",
            code="missing",
        )
    if count > len(low_res):
        raise UserError(f"--count {count} is more than the {len(low_res)} pictures: leave it out.", key="count")
    labels, _ = requested(request.model_copy(update={"count": count}), names)
    inputs = {"low_res": low_res[:count], "noise_level": request.noise_level}
    arguments = {**request.choices, "labels": labels, "count": count, **inputs}
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
    labels, count = requested(request, base.class_names(guide))
    first = {**request.choices, "labels": labels, "count": count, "classifier": guide}
    first["classifier_scale"] = request.classifier_scale
    second: dict[str, Any] = {
        "labels": labels if upsampler.class_labels else None,
        "count": count,
        "seed": request.seed,
    }
    second |= {"noise_level": request.noise_level, "steps": request.upsampler_steps}
    base.plan(**first)  # both refuse before anything is computed
    upsampler.plan(**second, low_res=torch.zeros(count, *base.shape))
    folder = samples_folder(request.out, request.model / f"samples-seed{request.seed}", request.overwrite)
    samples = yield from drawn(base, "sampling", first, request.batch_size)
    yield from saved(samples, folder / "base", request.overwrite)
    second["low_res"] = samples.images
    samples = yield from drawn(upsampler, "upscaling", second, request.batch_size)
    yield from saved(samples, folder, request.overwrite)


def read_pictures(places: tuple[Path, ...], channels: int) -> Tensor:
    """The pictures of files, folders and data sets, in their order, float32 [N, C, h, w] in [-1, 1].

    Raises:
        UserError: one cannot be read, or they are of several sizes.
    """
    names: list[str] = []
    images: list[Tensor] = []
    for name, image, num_values in (one for place in places for one in _images(place)):
        pixels = Preprocess(image.height, image.width, channels)(image)
        names.append(name)
        images.append(normalised(pixels, num_values))
        if images[-1].shape != images[0].shape:
            first, last = (f"{image.shape[2]}×{image.shape[1]}" for image in (images[0], images[-1]))
            raise UserError(
                f"{names[0]} is {first} and {name} is {last}: an up-sampler enlarges pictures of one size, so bring "
                "them to it first.",
                key=name,
                code="shape",
            )
    if not images:
        raise UserError("there are no pictures to enlarge: name some.", key="pictures", code="missing")
    return torch.stack(images)


def _images(place: Path) -> Iterator[tuple[str, Image.Image, int]]:
    """Name, picture and number of values of a channel for each picture of a file, folder or data set."""
    if place.suffix.lower() not in IMAGE_SUFFIXES:
        archive = place / "samples.npz"
        source = open_source(archive if archive.is_file() else place)
        yield from ((example.name, example.image, source.levels) for example in source)
        return
    try:
        image, _ = decode(place.read_bytes())
    except (OSError, UnreadablePicture) as error:
        raise UserError(f"{place} cannot be read: {error}.", key=str(place), code="damaged") from None
    yield str(place), image, 256
