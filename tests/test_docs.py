"""What the pages say of the code is true: sections that are cited exist, and the tour's symbols are where it says."""

from __future__ import annotations

import re

import pytest

from tests.shared import ROOT

SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])


def test_cited_sections_exist() -> None:
    known = set(re.findall(r"^## (\d+)\.", (ROOT / "docs" / "math.md").read_text(encoding="utf-8"), re.MULTILINE))
    for path in SOURCES:
        for section in re.findall(r"docs/math\.md §(\d+)", path.read_text(encoding="utf-8")):
            assert section in known, f"{path} cites §{section}"


def test_nothing_cites_a_page_outside_of_the_project() -> None:
    name = "MA" + "TH"
    for path in (*SOURCES, *PAGES):
        assert not re.search(rf"\b{name}\b(?!\.)", path.read_text(encoding="utf-8")), path


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


TOUR = re.findall(
    r"^\| .* \| `([\w/]+\.py)` \| `([^`]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M
)


@pytest.mark.parametrize(("path", "symbol"), TOUR)
def test_the_tours_symbols_are_where_it_says(path: str, symbol: str) -> None:
    assert symbol in (ROOT / "src" / "carrara" / path).read_text(encoding="utf-8")


def test_the_tour_is_not_empty() -> None:
    assert len(TOUR) >= 12
