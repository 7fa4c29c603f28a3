"""The protocol on the number: a metric carries how it was measured, and two that differ in that are not compared."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from carrara.errors import UserError, nearest
from carrara.evaluation.bootstrap import Interval


def versions() -> dict[str, str]:
    """What computed the metrics."""
    import carrara

    return {"carrara": carrara.__version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """How a metric was measured. Everything but `versions` must agree before two metrics are compared.

    Attributes:
        n: how many samples.
        shape: their [C, H, W].
        dtype: the number type they were measured from; "uint8" is what files contain.
        resize: how the real images came to that shape, filter included.
        reference: the name of the real data.
        reference_split: the part of it.
        reference_hash: hash of its content.
        reference_n: how many real images; None where a statistics file does not contain it.
        features: the feature network's name.
        features_checksum: SHA-256 of its weights.
        preparation: how images were resized and scaled for it.
        sampling: solver, steps, grid, η, guidance, seed, weights (EMA or raw): what the sampler reports.
        settings: the metric's own numbers (k, subsets, splits).
        versions: of the programs; recorded, not compared.
    """

    n: int
    shape: tuple[int, ...] = ()
    dtype: str = "uint8"
    resize: str = ""
    reference: str = ""
    reference_split: str = ""
    reference_hash: str = ""
    reference_n: int | None = None
    features: str = ""
    features_checksum: str = ""
    preparation: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def with_settings(self, **settings: Any) -> Stamp:
        """The same protocol with the metric's own numbers added."""
        return replace(self, settings={**self.settings, **settings})

    def entries(self) -> dict[str, Any]:
        """Flat names to values: `sampling.steps`, `settings.k`; empty ones left out, versions too."""
        flat: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                if item.name != "versions":
                    flat |= {f"{item.name}.{key}": entry for key, entry in value.items()}
            elif value not in ("", ()):
                flat[item.name] = list(value) if isinstance(value, tuple) else value
        return flat

    def text(self) -> str:
        """One line for reports."""
        return ", ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in self.entries().items())

    def differences(self, other: Stamp) -> dict[str, tuple[Any, Any]]:
        """Where two protocols differ: flat name to both values (None: not there)."""
        ours, theirs = self.entries(), other.entries()
        names = [*ours, *(name for name in theirs if name not in ours)]
        pairs = {name: (ours.get(name), theirs.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class Measurement:
    """A value, where it lies with confidence, and how it was measured.

    Attributes:
        note: what a reader must know before using it ("1,000 samples for 2,048 dimensions").
        details: what it is made of, as plain data (the terms of a bound at each time, a table of confusions).
    """

    value: float
    interval: Interval | None
    stamp: Stamp
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


Measurements = dict[str, Measurement]
"""Name of the metric -> what was measured."""

FORMER = {
    "memorised_share": "memorised_fraction",
    "memorised_share_held_out": "memorised_fraction_held_out",
    "class_spread": "class_std",
    "judge": "evaluator",
    "judge_rows": "evaluator_rows",
    "in the reference's shares": "in the reference's proportions",
}
"""Names of metrics, settings and values in files of earlier versions, which are still read."""


@dataclass(frozen=True)
class Comparison:
    """One metric in two runs, measured alike."""

    name: str
    first: Measurement
    second: Measurement

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second.value - self.first.value

    @property
    def beyond_chance(self) -> bool | None:
        """Whether the two intervals are apart; None where either has none."""
        a, b = self.first.interval, self.second.interval
        return None if a is None or b is None else a.high < b.low or b.high < a.low


def compare(first: Measurements, second: Measurements, varied: Collection[str] = ()) -> list[Comparison]:
    """The metrics that both runs measured, side by side.

    Args:
        varied: what was changed on purpose, by flat name (`sampling.steps`) or group (`sampling`); all else
            must be equal.

    Raises:
        UserError: no metric in common, a protocol that differs elsewhere (named), or an unknown name in `varied`.
    """
    names = [name for name in first if name in second]
    if not names:
        raise UserError(
            f"the two have no metric in common: {sorted(first)} and {sorted(second)}.", key="varied", code="mismatch"
        )
    known = {entry for run in (first, second) for m in run.values() for entry in m.stamp.entries()}
    known |= {entry.split(".")[0] for entry in known}
    for word in varied:
        if word not in known:
            raise UserError(
                f"'{word}' is no part of the protocol: {nearest(word, known)}", key="varied", code="unknown"
            )
    for name in names:
        differing = first[name].stamp.differences(second[name].stamp)
        refused = {key: pair for key, pair in differing.items() if not {key, key.split(".")[0]} & set(varied)}
        if refused:
            where = "; ".join(f"{key} is {a!r} and {b!r}" for key, (a, b) in refused.items())
            raise UserError(
                f"{name} was measured differently and is not comparable: {where}; "
                "measure both alike, or name it with --varied if it was varied on purpose.",
                key=", ".join(refused),
                code="mismatch",
            )
    return [Comparison(name, first[name], second[name]) for name in names]


# ---- on disk ------------------------------------------------------------------------------------------------


def to_json(measurements: Measurements) -> str:
    """The metrics with their intervals and stamps, as JSON text with sorted keys; what is not finite is null."""
    plain = {name: _finite(asdict(m)) for name, m in measurements.items()}
    return json.dumps(plain, indent=2, sort_keys=True, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """Plain data with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(text: str, name: str = "the metrics") -> Measurements:
    """The inverse of `to_json`.

    Raises:
        UserError: not JSON, or not metrics that Carrara wrote.
    """
    try:
        return dict(_measurements(json.loads(text)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name} does not contain metrics with their stamps ({error}): write it with carrara.",
            key=name,
            code="damaged",
        ) from None


def load(path: str | Path) -> Measurements:
    """The metrics of a JSON file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file '{path}' of metrics.", key=str(path), code="missing")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.", key=str(path), code="damaged") from None
    return from_json(text, f"'{path}'")


def _interval(entry: Mapping[str, Any] | None) -> Interval | None:
    """An interval whose ends are numbers; None otherwise."""
    if entry is None or any(entry[end] is None for end in ("low", "high")):
        return None
    return Interval(**entry)


def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The same under today's names, also those of single classes, "metric[class]"."""

    def today(name: str) -> str:
        metric, bracket, rest = name.partition("[")
        return FORMER.get(metric, metric) + bracket + rest

    return {today(name): entry for name, entry in entries.items()}


def _measurements(raw: dict[str, Any]) -> Iterator[tuple[str, Measurement]]:
    for name, entry in renamed(raw).items():
        own = entry["stamp"]
        sampling = {key: FORMER.get(str(value), value) for key, value in own["sampling"].items()}
        changed = {"shape": tuple(own["shape"]), "sampling": sampling, "settings": renamed(own["settings"])}
        stamp = Stamp(**{**own, **changed})
        value = math.nan if entry["value"] is None else float(entry["value"])
        yield name, Measurement(value, _interval(entry["interval"]), stamp, entry["note"], entry.get("details", {}))
