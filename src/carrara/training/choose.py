"""A recipe for a folder of images, chosen by what the data check found, with the reasons."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from carrara.data.check import DataReport, check_data
from carrara.errors import UserError
from carrara.recipe import override

_SIZES = (256, 128, 64, 32, 16, 8)
"""Sides a recipe may be chosen for: all can be halved as often as its network does."""

_NETWORKS: dict[int, dict[str, Any]] = {
    8: {"channels": 32, "channel_mult": [1, 2], "blocks_per_level": 2, "attention": [2]},
    16: {"channels": 48, "channel_mult": [1, 2], "blocks_per_level": 2, "attention": [2]},
    32: {"channels": 64, "channel_mult": [1, 2, 2], "blocks_per_level": 2, "attention": [2, 4]},
    64: {"channels": 64, "channel_mult": [1, 2, 3, 4], "blocks_per_level": 2, "attention": [4, 8]},
    128: {"channels": 96, "channel_mult": [1, 1, 2, 3, 4], "blocks_per_level": 2, "attention": [8, 16]},
    256: {"channels": 128, "channel_mult": [1, 1, 2, 2, 4, 4], "blocks_per_level": 2, "attention": [16, 32]},
}
_GUIDANCE = {"none": 1.0, "labels": 1.5, "text": 3.0}
_BATCHES = {8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8}


def recipe_for(path: Path, changes: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Plain recipe data for a folder (or file) of images, and a sentence for each choice.

    Args:
        changes: `key=value` overrides that are going to be applied; those of `data` and the batch size are
            already taken into account here.

    Raises:
        UserError: the data check found what would make training fail.
    """
    changed = override({}, [c for c in changes if c.startswith(("data.", "training.batch_size"))])
    wanted: dict[str, Any] = changed.get("data", {})
    report = check_data(
        path,
        split=wanted.get("split", "train"),
        channels=wanted.get("channels"),
        batch_size=1,
        caption_column=wanted.get("caption_column"),
        unreadable_limit=wanted.get("unreadable_limit", 0.01),
        sample=2000,
    )
    if report.problems:
        raise UserError(report.problems[0], key=str(path), code="unsupported")
    side = _side(report, wanted.get("resolution"))
    batch = changed.get("training", {}).get("batch_size") or _batch(report.images, _BATCHES[side])
    kind = _condition(report)
    channels = wanted.get("channels", report.suggested["channels"])
    data = {
        "name": re.sub(r"[^\w.-]", "-", path.resolve().name) or "images",
        "data": {"path": str(path), "resolution": side, "channels": channels},
        "conditioning": {"kind": kind},
        "network": _NETWORKS[side],
        "objective": {"predicts": "v"},
        "training": {
            "steps": 20_000,
            "batch_size": batch,
            "learning_rate": 2e-4,
            "warmup": 500,
            "ema": 0.999 if report.images < 20_000 else 0.9999,
        },
        "sampling": {"guidance": _GUIDANCE[kind]},
    }
    return data, _reasons(path, report, data)


def _condition(report: DataReport) -> str:
    """What a model of these images is conditioned on: their captions, else their classes."""
    if report.captions is not None and report.captions["distinct"] > 1 and _reads_text():
        return "text"
    return "labels" if report.classes is not None and len(report.classes) > 1 else "none"


def _reads_text() -> bool:
    """Whether the package is installed that makes a vocabulary of captions."""
    return importlib.util.find_spec("tokenizers") is not None


def _side(report: DataReport, wanted: Any) -> int:
    """The recipe size for a requested resolution, else the largest that the smaller images still fill."""
    if isinstance(wanted, (list, tuple)) and wanted:
        wanted = min(wanted)
    low = int(wanted) if wanted else int(min(report.suggested["resolution"]))
    return next((size for size in _SIZES if size <= low and size <= (256 if wanted else 64)), _SIZES[-1])


def _batch(images: int, usual: int) -> int:
    """The usual batch, or the largest power of two that the data still fill."""
    while usual > images:
        usual //= 2
    return max(usual, 1)


def _reasons(path: Path, report: DataReport, data: dict[str, Any]) -> list[str]:
    side = data["data"]["resolution"]
    lines = [f"{path}: {report.layout}.", *report.warnings]
    lines.append(
        f"resolution {side}×{side}: the shorter side is resized to {side} and the rest cropped at the centre; "
        "change it with --resolution."
    )
    if data["conditioning"]["kind"] == "labels":
        assert report.classes is not None
        lines.append(f"class-conditional: {len(report.classes)} classes, the label dropped for one image in ten.")
    if data["conditioning"]["kind"] == "text":
        lines.append(
            "text-conditional: captions are read by an encoder that is trained with the network, and dropped for "
            "one image in ten; encoder=minilm takes a pretrained one, kind=labels the classes."
        )
    elif report.captions is not None and not _reads_text():
        lines.append("the captions are not trained on: that needs pip install 'carrara[text]'.")
    network = yaml.safe_dump(data["network"], default_flow_style=True, width=1000).strip()
    lines.append(
        f"a recipe for {side}×{side}: network {network}, batch {data['training']['batch_size']}, "
        f"{data['training']['steps']:,} steps; --set changes it."
    )
    return lines
