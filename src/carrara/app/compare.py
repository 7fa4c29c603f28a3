"""Two results of `evaluate` side by side, if they were measured alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from carrara.app.events import Event, Metrics
from carrara.app.request import Request


class CompareRequest(Request):
    """Two files that `evaluate` wrote.

    Attributes:
        first, second: the JSON files.
        varied: what may differ, by name ("sampling.steps") or group ("sampling").
    """

    first: Path
    second: Path
    varied: tuple[str, ...] = ()


def compare(request: CompareRequest) -> Iterator[Event]:
    """Yields `Metrics` "comparison" (`result`: the list of `Comparison`).

    Raises:
        UserError: their protocols differ, and where; or a file that does not hold metrics.
    """
    from carrara.evaluation import compare, stamp

    pairs = compare(stamp.load(request.first), stamp.load(request.second), request.varied)
    values = {
        pair.name: {
            "first": pair.first.value,
            "second": pair.second.value,
            "difference": pair.difference,
            "beyond_chance": pair.beyond_chance,
        }
        for pair in pairs
    }
    yield Metrics("comparison", values, pairs)
