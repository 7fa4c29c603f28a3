"""Nearest neighbours by Euclidean distance, chunk by chunk: memory O(N), never N × M × D."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1024


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of rows x [N, D] to rows y [M, D], yielded as (rows of x, float64 [chunk, M]).

    Taken as |x|² + |y|² - 2x·y after centring, in float64: about 1e-15 of the squared extent of the data.
    """
    centre = y.mean(0)
    x, y = x - centre, y - centre
    own = y.square().sum(1)
    for start in range(0, len(x), CHUNK):
        part = slice(start, min(start + CHUNK, len(x)))
        rows = x[part]
        distance = torch.addmm(own[None] + rows.square().sum(1, keepdim=True), rows, y.T, alpha=-2)
        yield part, distance.clamp_min_(0)


def nearest(x: Tensor, y: Tensor, same: bool = False) -> tuple[Tensor, Tensor]:
    """For each row of x [N, D] the nearest row of y [M, D]: (index int64 [N], distance float64 [N]).

    `same`: x is y, and a row is not its own neighbour (an equal other row is). Distances are taken again
    directly from the rows found, so an exact copy is at exactly 0.
    """
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for part, squared in squared_distances(x, y):
        if same:
            _exclude_self(part, squared)
        index[part] = squared.argmin(1)
    distance = torch.cat(
        [(a - y[i]).square().sum(1).sqrt() for a, i in zip(x.split(CHUNK), index.split(CHUNK), strict=True)]
    )
    return index, distance


def _exclude_self(part: slice, squared: Tensor) -> None:
    squared[:, part].fill_diagonal_(torch.inf)
