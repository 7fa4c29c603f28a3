"""What a use case reports while it works: a small closed set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Notice:
    """A sentence for the user."""

    text: str

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"event": "notice", "text": self.text}


@dataclass(frozen=True)
class StepDone:
    """How far a task is.

    Attributes:
        task: what is done ("sampling"); tasks may alternate, each counts for itself.
        step, total: done, of so many; a total of 0 is not known.
        note: what else changes from step to step ("t = 0.25").
        preview: images [B, C, H, W] in [-1, 1] as they are now, where they are at hand.
        values: numbers of this step (loss, images_per_s).
    """

    task: str
    step: int
    total: int
    note: str = ""
    preview: Tensor | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data, without the preview."""
        return {"event": "step", "task": self.task, "step": self.step, "total": self.total, **self.values}


@dataclass(frozen=True)
class Preview:
    """Images [B, C, H, W] in [-1, 1] worth looking at before the work is done."""

    images: Tensor

    def as_json(self) -> dict[str, Any]:
        """Plain data, without the images."""
        return {"event": "preview", "shape": list(self.images.shape)}


@dataclass(frozen=True)
class Metrics:
    """What was found out.

    Attributes:
        name: of what ("start", "evaluation", "comparison", …).
        values: all of it as plain data.
        result: the same as a typed object, for callers in this process.
    """

    name: str
    values: Mapping[str, Any]
    result: Any = None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"event": "metrics", "name": self.name, "values": dict(self.values)}


@dataclass(frozen=True)
class Saved:
    """A file or folder that now holds what was asked for.

    Attributes:
        what: "samples", "model", "report", …
        about: what is in it, as plain data.
    """

    what: str
    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"event": "saved", "what": self.what, "path": str(self.path), **self.about}


Event = Notice | StepDone | Preview | Metrics | Saved
