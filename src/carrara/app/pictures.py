"""A user's own pictures, as inputs of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from carrara.data import Preprocess, open_source
from carrara.data.batches import normalised
from carrara.data.decode import IMAGE_SUFFIXES, UnreadablePicture, decode
from carrara.errors import UserError


def read_pictures(places: Sequence[Path], channels: int) -> Tensor:
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
