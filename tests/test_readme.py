"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.shared import ROOT
from tests.test_classifier import untrained

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_snippets_run_one_after_the_other(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(SNIPPETS) == 4
    for run in ("demo", "digits"):
        shutil.copytree(tiny_run, tmp_path / "runs" / run)
    untrained().save(tmp_path / "runs" / "digits-classifier")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    result = names["result"]
    assert result.metadata["classifier_scale"] == 4  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "samples.npz").exists()


def test_the_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
