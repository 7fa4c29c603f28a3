"""By which a run knows its data again."""

from __future__ import annotations

import hashlib

import numpy as np

from carrara.data.decode import UnreadablePicture
from carrara.data.source import Source

SAMPLED = 64
"""Images whose content is hashed: the first, the last, and evenly spaced ones between them."""


def identity(source: Source) -> dict[str, int | str]:
    """What is compared when a run is resumed, by what it is: "images", "bytes of images", "names of images", ….

    It notices images that are added, removed, renamed, put in another order or given other labels, and nearly every
    change of a file's size (the sum of all sizes is compared). Of contents and captions it reads `SAMPLED` images
    alone: other pixels or captions of the rest, with as many bytes in all, go unnoticed. A folder that was moved as a
    whole is the same.
    """
    count = len(source)
    names = hashlib.blake2b(digest_size=16)
    for index in range(count):
        names.update(source.pictures.name(index).encode() + b"\0")
    labels = b"none" if source.labels is None else source.labels.tobytes()
    content = hashlib.blake2b(digest_size=16)
    for index in sorted(set(np.linspace(0, count - 1, min(count, SAMPLED)).round().astype(int).tolist())):
        try:
            content.update(source.pictures.read(index))
        except UnreadablePicture:
            content.update(b"unreadable")
        if source.captions is not None:
            content.update(source.captions[index].encode("utf-8", "surrogatepass"))
    return {
        "number of images": count,
        "bytes of images": source.pictures.encoded_bytes,
        "names of images": names.hexdigest(),
        "labels": hashlib.blake2b(labels, digest_size=16).hexdigest(),
        "content of images": content.hexdigest(),
    }
