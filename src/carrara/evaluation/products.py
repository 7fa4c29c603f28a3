"""Inner products of the rows of two sets, block by block: what all metrics of pairs are made of.

The products take nearly all the time of such metrics, so one pass over the blocks serves several of them. Memory is
that of a block, never of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

BLOCK = 1024

Which = Literal["samples", "reference", "between"]
"""Products within the samples, within the reference, or of the one with the other."""


@dataclass(frozen=True)
class Side:
    """One of the two sets, around the centre of the reference: identical pictures are at exactly 0 from each other.

    Attributes:
        rows: float64 [N, D], less the centre c.
        squares: [N], |x - c|².
        along: [N], (x - c)·c.
    """

    rows: Tensor
    squares: Tensor
    along: Tensor

    @classmethod
    def of(cls, rows: Tensor, centre: Tensor) -> Side:
        """The side of rows [N, D]."""
        centred = rows - centre
        return cls(centred, centred.square().sum(1), centred @ centre)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Block:
    """The products (x - c)·(y - c) of some rows x with some rows y, float64 [rows, columns].

    Within one set only blocks on or above the diagonal are computed.
    """

    which: Which
    first: Side
    second: Side
    rows: slice
    columns: slice
    products: Tensor

    @property
    def diagonal(self) -> bool:
        """Whether rows meet themselves."""
        return self.which != "between" and self.rows == self.columns

    def squared_distances(self) -> Tensor:
        """|x - y|², about 1e-15 of the squared extent of the data off."""
        squares = self.first.squares[self.rows, None] + self.second.squares[None, self.columns]
        return squares.sub_(self.products, alpha=2).clamp_min_(0)


class Visitor(Protocol):
    """What takes something from every block: first within the samples, then within the reference, then between."""

    def visit(self, block: Block) -> None: ...


@dataclass(frozen=True)
class Sets:
    """Samples and reference, float64, with the centre of the reference taken off both.

    Attributes:
        centre_square: |c|², so that x·y = (x - c)·(y - c) + (x - c)·c + (y - c)·c + |c|².
    """

    samples: Side
    reference: Side
    centre_square: float

    @classmethod
    def of(cls, samples: Tensor, reference: Tensor) -> Sets:
        """The sets of rows [N, D] and [M, D]."""
        centre = reference.mean(0)
        return cls(Side.of(samples, centre), Side.of(reference, centre), float(centre.square().sum()))

    def visit(self, *visitors: Visitor) -> None:
        """Hand every block to every visitor."""
        for block in self._blocks():
            for visitor in visitors:
                visitor.visit(block)

    def _blocks(self) -> Iterator[Block]:
        both: list[tuple[Which, Side, Side]] = [
            ("samples", self.samples, self.samples),
            ("reference", self.reference, self.reference),
            ("between", self.samples, self.reference),
        ]
        for which, first, second in both:
            for low in range(0, len(first), BLOCK):
                rows = slice(low, min(low + BLOCK, len(first)))
                for start in range(0 if which == "between" else low, len(second), BLOCK):
                    columns = slice(start, min(start + BLOCK, len(second)))
                    yield Block(which, first, second, rows, columns, first.rows[rows] @ second.rows[columns].T)


class Nearest:
    """The squared distances of every row of one set to its k nearest other rows of that set, float64 [N, k]."""

    def __init__(self, side: Side, which: Which, k: int) -> None:
        self._which = which
        self._nearest = side.rows.new_full((len(side), k), torch.inf)

    def visit(self, block: Block, squared: Tensor) -> None:
        """Take what is nearer from a block and its squared distances, which are left without their diagonal."""
        if block.which != self._which:
            return
        if block.diagonal:
            squared.fill_diagonal_(torch.inf)
        else:
            self._take(block.columns, squared.T)
        self._take(block.rows, squared)

    def _take(self, rows: slice, squared: Tensor) -> None:
        k = self._nearest.shape[1]
        near = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).values
        self._nearest[rows] = torch.cat([self._nearest[rows], near], 1).topk(k, dim=1, largest=False).values

    def radius(self, k: int) -> Tensor:
        """The squared distance to the k-th nearest, [N], once all blocks were seen."""
        return self._nearest.sort(dim=1).values[:, k - 1]
