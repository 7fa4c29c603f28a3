"""Exact and near duplicates among many pictures, without comparing each with each."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

METHOD = (
    "exact: the same decoded pixels (BLAKE2); near: 64-bit DCT hashes of the gray picture at most 4 bits apart "
    "(Zauner 2010) and 8×8 colour thumbnails at most 8 of 255 levels apart on average"
)

_SIDE = 32
_BITS_APART = 4
_BANDS = [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]  # hashes 4 bits apart agree wholly in one of 5 bands
_LEVELS_APART = 8.0

Hashes = NDArray[np.uint64]


def pixel_hash(image: Image.Image) -> bytes:
    """A hash of the decoded pixels, the size and the mode: equal for exact duplicates in any encoding."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16)
    digest.update(repr((image.size, image.mode)).encode())
    return digest.digest()


def thumbnails(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What a perceptual comparison looks at: gray uint8 [32, 32] and colour uint8 [8, 8, 3], on white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    gray = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    colour = image.convert("RGB").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(gray), np.asarray(colour)


def perceptual_hashes(gray: NDArray[np.uint8]) -> Hashes:
    """The DCT hash of gray thumbnails [N, 32, 32]: uint64 [N].

    The 8×8 lowest frequencies but the constant one, each above (1) or below (0) their median: unmoved by size,
    compression and brightness (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
    Functions", §3.2.1).
    """
    frequency, place = np.mgrid[0:8, 0:_SIDE]
    basis = np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE)).astype(np.float32)
    low = (basis @ gray.astype(np.float32) @ basis.T).reshape(len(gray), 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


def exact_groups(hashes: Sequence[bytes]) -> list[list[int]]:
    """Groups of two or more indices with the same hash, in order of their first member."""
    members: dict[bytes, list[int]] = defaultdict(list)
    for index, value in enumerate(hashes):
        members[value].append(index)
    return [group for group in members.values() if len(group) > 1]


def near_groups(hashes: Hashes, colours: NDArray[np.uint8]) -> list[list[int]]:
    """Groups of two or more indices that are linked by near-duplicate pairs.

    Args:
        hashes: uint64 [N], `perceptual_hashes`.
        colours: uint8 [N, 8, 8, 3], `thumbnails`.
    """
    flat = colours.reshape(len(colours), -1).astype(np.int16)
    parent = np.arange(len(hashes))
    for left, right in _candidates(hashes):
        apart = np.abs(flat[left] - flat[right]).mean(axis=1)
        for i, j in zip(left[apart <= _LEVELS_APART], right[apart <= _LEVELS_APART], strict=True):
            parent[_root(parent, int(i))] = _root(parent, int(j))
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(hashes)):
        members[_root(parent, index)].append(index)
    return sorted(group for group in members.values() if len(group) > 1)


def _candidates(hashes: Hashes) -> Iterable[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs of hashes at most `_BITS_APART` apart: sorted by one band, neighbours of equal band are compared."""
    for low, width in _BANDS:
        key = (hashes >> np.uint64(low)) & np.uint64(2**width - 1)
        order = np.argsort(key, kind="stable")
        key, value = key[order], hashes[order]
        alive = np.arange(len(order))
        step = 0
        while alive.size:
            step += 1
            alive = alive[alive + step < len(order)]
            alive = alive[key[alive] == key[alive + step]]
            close = alive[_bits(value[alive] ^ value[alive + step]) <= _BITS_APART]
            if close.size:
                yield order[close], order[close + step]


def _bits(words: Hashes) -> NDArray[np.int64]:
    """The number of ones in each word."""
    ones: NDArray[np.int64] = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1, dtype=np.int64)
    return ones


def _root(parent: NDArray[np.intp], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index
