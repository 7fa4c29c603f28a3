"""Where the tests find the shared reference data, which never lies inside the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CARRARA_SHARED", ROOT.parent / "shared"))


def shared(*parts: str) -> Path:
    """The path of a shared file or folder; skips the test, with the reason, where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent (set CARRARA_SHARED to the folder of shared reference data)")
    return path
