"""The prompt syntax of AUTOMATIC1111's web UI: emphasis by brackets, and BREAK between chunks.

| written | weight |
|---|---|
| `(a)` | 1.1 |
| `[a]` | 1/1.1 |
| `(a:1.3)` | 1.3 |
| `\\(`, `\\)`, `\\[`, `\\]`, `\\\\` | the character itself |

Nested brackets multiply. A bracket that is never closed ends with the prompt; one that was never opened is a character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

EMPHASIS = 1.1
"""What one pair of round brackets multiplies by."""

_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|\s*\b(?P<pause>BREAK)\b\s*"
    r"|(?P<text>[^\\()\[\]:B]+|.)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Span:
    """A piece of a prompt.

    Attributes:
        text: without the syntax; "" where `pause`.
        weight: of its tokens; 1 is plain.
        pause: a BREAK: what follows begins a new chunk.
    """

    text: str
    weight: float = 1.0
    pause: bool = False


def parse(prompt: str) -> list[Span]:
    """The spans of a prompt, neighbours of equal weight joined; at least one.

    Every string has a meaning: nothing is refused.
    """
    texts: list[str | None] = []  # None is a pause
    weights: list[float] = []
    opened: list[tuple[str, int]] = []  # a bracket, and the piece that comes first inside

    def close(bracket: str, factor: float) -> bool:
        """Multiply what lies inside the last such bracket; False where none is open."""
        place = next((i for i in reversed(range(len(opened))) if opened[i][0] == bracket), None)
        if place is None:
            return False
        _, first = opened.pop(place)
        weights[first:] = [weight * factor for weight in weights[first:]]
        return True

    for piece in _PIECE.finditer(prompt):
        kind, value = piece.lastgroup, piece[0]
        if kind == "bracket" and value in "([":
            opened.append((value, len(texts)))
            continue
        if (
            (kind == "weight" and close("(", float(piece["weight"])))
            or (value == ")" and close("(", EMPHASIS))
            or (value == "]" and close("[", 1 / EMPHASIS))
        ):
            continue
        texts.append(None if kind == "pause" else piece["escaped"] or value)
        weights.append(1.0)
    while opened:
        bracket = opened[-1][0]
        close(bracket, EMPHASIS if bracket == "(" else 1 / EMPHASIS)
    return list(_joined(texts, weights)) or [Span("")]


def _joined(texts: list[str | None], weights: list[float]) -> Iterator[Span]:
    held = Span("")
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            if held.text:
                yield held
            yield Span("", pause=True)
            held = Span("")
        elif held.text and held.weight != weight:
            yield held
            held = Span(text, weight)
        else:
            held = Span(held.text + text, weight)
    if held.text:
        yield held
