"""The prompt syntax against a direct implementation of its rule, and on every string."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrara.text import parse
from carrara.text.prompts import Span

PROMPTS = (
    "",
    "a cat",
    "(cat)",
    "[cat]",
    "(cat:1.3)",
    "((cat))",
    "[[cat]]",
    "([cat])",
    "(a (b) c)",
    "(a (b:1.5) c:2)",
    "(a [b] c:0.5)",
    "a (b",
    "a [b",
    "(a [b (c",
    "a) b] c",
    "a:1.2)",
    "(a:1.2",
    "(a:b:1.2)",
    "(a:1.2) (b:0.8)",
    r"\(a\)",
    r"\[a\] \\ b",
    r"(a \(b\) c:1.4)",
    "(a: 1.2 )",
    "(a:+1.2)",
    "(a:-1)",
    "(a:.5)",
    "a BREAK b",
    "(a BREAK b:1.2)",
    "BREAKING news",
    "a ( b ) c, (d:1.1), [e]",
    "🙂 (красный:1.2) مرحبا",
    "((((a))))b[[[[c",
)


def expected(prompt: str) -> list[tuple[str, float]]:
    """The weight of every character, by reading from left to right; a pause is ("BREAK", -1)."""
    out: list[tuple[str, float]] = []
    round_: list[int] = []
    square: list[int] = []
    place = 0

    def multiply(start: int, factor: float) -> None:
        for index in range(start, len(out)):
            if out[index][1] != -1:
                out[index] = (out[index][0], out[index][1] * factor)

    while place < len(prompt):
        rest = prompt[place:]
        number = re.match(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)", rest)
        pause = re.match(r"\s*\bBREAK\b\s*", prompt[place:]) if place == 0 or not prompt[place - 1].isalnum() else None
        if rest[0] == "\\" and len(rest) > 1 and rest[1] in "()[]\\":
            out.append((rest[1], 1.0))
            place += 2
        elif number and round_:
            multiply(round_.pop(), float(number[1]))
            place += number.end()
        elif rest[0] == "(":
            round_.append(len(out))
            place += 1
        elif rest[0] == "[":
            square.append(len(out))
            place += 1
        elif rest[0] == ")" and round_:
            multiply(round_.pop(), 1.1)
            place += 1
        elif rest[0] == "]" and square:
            multiply(square.pop(), 1 / 1.1)
            place += 1
        elif pause and pause.end():
            out.append(("BREAK", -1))
            place += pause.end()
        else:
            out.append((rest[0], 1.0))
            place += 1
    for start in round_:
        multiply(start, 1.1)
    for start in square:
        multiply(start, 1 / 1.1)
    return out


def characters(spans: list[Span]) -> list[tuple[str, float]]:
    return [pair for s in spans for pair in ([("BREAK", -1)] if s.pause else [(c, s.weight) for c in s.text])]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_follows_the_rule(prompt: str) -> None:
    found, right = characters(parse(prompt)), expected(prompt)
    assert [text for text, _ in found] == [text for text, _ in right]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in right])


@given(st.text(alphabet="ab ()[]\\:1.5BREAK", max_size=40))
def test_every_string_has_spans_and_no_character_appears_twice(prompt: str) -> None:
    spans = parse(prompt)
    assert spans
    text = "".join(span.text for span in spans)
    assert len(text) <= len(prompt)


def test_neighbours_of_equal_weight_are_one_span() -> None:
    assert parse(r"a \(b\) c") == [Span("a (b) c")]
    assert parse("") == [Span("")]
