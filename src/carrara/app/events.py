"""What a use case reports while it works: a small closed set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

LOCAL = {"plain": False}
"""Of a field that is for callers in this process only."""


@dataclass(frozen=True)
class _Event:
    kind: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """Plain data: everything but tensors and typed results."""
        names = [f.name for f in fields(self) if f.metadata != LOCAL]
        values = {name: getattr(self, name) for name in names}
        return {"event": self.kind} | {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


@dataclass(frozen=True)
class Notice(_Event):
    """A sentence for the user."""

    kind = "notice"
    text: str


@dataclass(frozen=True)
class StepDone(_Event):
    """How far a task is.

    Attributes:
        task: what is done ("sampling"); tasks may alternate, each counts for itself.
        step, total: done, of so many; a total of 0 is not known.
        note: what else changes from step to step ("t = 0.25").
        preview: images [B, C, H, W] in [-1, 1] as they are now, where they are at hand.
    """

    kind = "step"
    task: str
    step: int
    total: int
    note: str = ""
    preview: Tensor | None = field(default=None, metadata=LOCAL)


@dataclass(frozen=True)
class Preview(_Event):
    """Images [B, C, H, W] in [-1, 1] worth looking at before the work is done."""

    kind = "preview"
    images: Tensor = field(metadata=LOCAL)


@dataclass(frozen=True)
class Metrics(_Event):
    """What was measured.

    Attributes:
        name: of what ("start", "evaluation", "comparison", …).
        values: all of it as plain data.
        result: the same as a typed object.
    """

    kind = "metrics"
    name: str
    values: Mapping[str, Any]
    result: Any = field(default=None, metadata=LOCAL)


@dataclass(frozen=True)
class Saved(_Event):
    """A file or folder that now contains what was requested.

    Attributes:
        what: "samples", "model", "report", …
        about: what is in it, as plain data.
    """

    kind = "saved"
    what: str
    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)


Event = Notice | StepDone | Preview | Metrics | Saved
