"""Pages as a browser and as a parser see them."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

VOID = {"meta", "link", "img", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str = "") -> list[Element]:
        """Every element of that tag below this one."""
        found = [element for child in self.children for element in (child, *child.all())]
        return [element for element in found if tag in ("", element.tag)]

    def words(self) -> str:
        """The text in this element and below it."""
        return self.text + "".join(child.words() for child in self.children)


class Tree(HTMLParser):
    """Parses a page; an element closed in the wrong order is an error."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(source)
        self.close()
        assert len(self.open) == 1, f"never closed: {[e.tag for e in self.open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> is given twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


MEASURE = """
addEventListener("load", () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const width = () => page.documentElement.scrollWidth - view.innerWidth;
  const closed = width();
  page.querySelectorAll("details").forEach(element => element.open = true);
  document.body.dataset.measured = JSON.stringify({
    inner: view.innerWidth, overflow: Math.max(closed, width()),
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    paper: view.getComputedStyle(page.body).backgroundColor,
    pictures: [...page.images].filter(image => image.naturalWidth > 0).length,
    digit: page.images.length ? page.images[0].getBoundingClientRect().width : 0,
  });
});
"""


def browse(source: str, width: int, scheme: str, folder: Path) -> tuple[dict[str, object], list[str], Image.Image]:
    """Load a page in a frame `width` wide (a window may not be narrower than 500): measures, complaints, picture."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser found: none of {', '.join(names)} is on the PATH")
    frame = f'<iframe style="width:{width}px;height:3000px;border:0" srcdoc="{html.escape(source)}"></iframe>'
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<body style="margin:0">{frame}<script>{MEASURE}</script></body>',
        encoding="utf-8",
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--hide-scrollbars", "--virtual-time-budget=3000", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},3000"]
    command += ["--dump-dom", f"--screenshot={folder / 'shot.png'}", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (body,) = Tree(done.stdout).root.all("body")
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    shot = Image.open(folder / "shot.png").convert("RGB").crop((0, 0, width, 3000))
    return json.loads(body.attributes["data-measured"]), complaints, shot
