"""Chunks of tokens: how many, where they break, and what stands around them."""

from __future__ import annotations

from carrara.text import Format, Span, chunks

COMMA = 1
FORM = Format(length=77, prefix=(98,), suffix=(99,), pad=0, comma=COMMA)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def words(*ids: int) -> str:
    return " ".join(map(str, ids))


def test_a_short_prompt_is_framed_and_padded() -> None:
    (chunk,) = chunks([Span(words(5, 6), 1.3)], numbers, FORM)
    assert chunk.ids == (98, 5, 6, 99, *[0] * 73)
    assert chunk.weights == (1, 1.3, 1.3, 1, *[1] * 73)
    assert chunk.used == 4


def test_an_empty_prompt_is_one_chunk() -> None:
    (chunk,) = chunks([Span("")], numbers, FORM)
    assert chunk.ids[:3] == (98, 99, 0)


def test_76_tokens_take_two_chunks() -> None:
    assert len(chunks([Span(words(*[5] * 75))], numbers, FORM)) == 1
    first, second = chunks([Span(words(*[5] * 76))], numbers, FORM)
    assert (first.used, second.used) == (77, 3)


def test_a_full_chunk_breaks_after_a_comma_within_reach() -> None:
    for back, kept in ((1, 74), (19, 56), (20, 55), (0, 75)):
        ids = [5] * 75
        if back:
            ids[75 - 1 - back] = COMMA
        first, _ = chunks([Span(words(*ids, 5, 5))], numbers, FORM)
        assert first.used - 2 == (kept if 0 < back < 20 else 75), back


def test_a_pause_starts_a_chunk() -> None:
    found = chunks([Span(words(5)), Span("", pause=True), Span(words(6))], numbers, FORM)
    assert [chunk.ids[1] for chunk in found] == [5, 6]
    leading = chunks([Span("", pause=True), Span(words(6))], numbers, FORM)
    assert [chunk.used for chunk in leading] == [2, 3]
