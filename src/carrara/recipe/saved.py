"""Recipes that earlier versions saved: every run had the sections of all kinds, those of others at their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carrara.recipe.section import Section

_DEFAULTS: dict[str, dict[str, Any]] = {
    "conditioning": {"kind": "none", "dropout": 0.1},
    "codec": {},
    "network": {},
    "loss": {},
    "discriminator": {},
    "schedule": {"kind": "cosine", "zero_terminal_snr": False},
    "objective": {
        "predicts": "eps",
        "loss": "simple",
        "vlb_weight": 1e-3,
        "weight": {"kind": "uniform", "gamma": 5.0, "floor": 0.0},
        "times": {"kind": "uniform"},
    },
    "sampling": {
        "solver": "dpm++2m",
        "steps": 20,
        "spacing": "trailing",
        "guidance": 1.0,
        "count": 16,
        "seed": 0,
    },
}


def current(data: Mapping[str, Any], recipe: type[Section]) -> dict[str, Any]:
    """The data without sections and keys of other kinds of run at their defaults, and with today's names."""
    kept = dict(data)
    for section, defaults in _DEFAULTS.items():
        value = kept.get(section)
        if not isinstance(value, Mapping):
            continue
        taken = _keys(recipe, section)
        rest = {k: v for k, v in value.items() if k in taken or k not in defaults or v != defaults[k]}
        kept[section] = rest
        if not rest:
            del kept[section]
    schedule, objective = kept.get("schedule"), kept.get("objective")
    if isinstance(schedule, Mapping) and schedule.get("zero_terminal_snr") is False:
        kept["schedule"] = {k: v for k, v in schedule.items() if k != "zero_terminal_snr"}
    if isinstance(objective, Mapping) and isinstance(times := objective.get("times"), Mapping):
        kept["objective"] = {**objective, "times": {"std" if k == "spread" else k: v for k, v in times.items()}}
    return kept


def _keys(recipe: type[Section], section: str) -> set[str]:
    """The keys of a section that a kind of run takes; of a section of several kinds all that are listed here."""
    if section not in recipe.model_fields:
        return set()
    kind: Any = recipe.model_fields[section].annotation
    whole = isinstance(kind, type) and "kind" not in kind.model_fields  # type: ignore[attr-defined]
    return set(kind.model_fields if whole else _DEFAULTS[section])
