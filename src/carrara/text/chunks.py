"""From the spans of a prompt to chunks of token ids of one length, each with its own first and last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from carrara.text.prompts import Span

COMMA_REACH = 20
"""A full chunk ends after a comma where one lies among its last so many tokens."""


@dataclass(frozen=True)
class Format:
    """How an encoder wants its tokens.

    Attributes:
        length: tokens of a chunk, those around it included.
        prefix, suffix: the ids around a chunk's own (CLIP's begin and end of text, BERT's [CLS] and [SEP]).
        pad: the id after the suffix, up to `length`.
        comma: the id of a comma, or None.
    """

    length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int
    comma: int | None = None

    @property
    def room(self) -> int:
        """Tokens of its own that a chunk has room for."""
        return self.length - len(self.prefix) - len(self.suffix)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one pass through the encoder.

    Attributes:
        ids: `length` of them.
        weights: of each; 1 for those around the prompt's own.
        used: how many come before the padding.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    used: int


def chunks(spans: Sequence[Span], tokenize: Callable[[str], Sequence[int]], form: Format) -> list[Chunk]:
    """The chunks of a prompt; at least one. A pause ends a chunk, even an empty one.

    Args:
        tokenize: text to ids, without the ids around it.
    """
    done: list[list[tuple[int, float]]] = []
    held: list[tuple[int, float]] = []
    for span in spans:
        if span.pause:
            done.append(held)
            held = []
        for token in tokenize(span.text) if span.text else ():
            if len(held) == form.room:
                cut = _after_comma(held, form.comma) if token != form.comma else len(held)
                done.append(held[:cut])
                held = held[cut:]
            held.append((token, span.weight))
    if held or not done:
        done.append(held)
    return [_framed(tokens, form) for tokens in done]


def _after_comma(held: Sequence[tuple[int, float]], comma: int | None) -> int:
    """How many tokens stay where a chunk is full: up to the last comma within reach, else all."""
    for back in range(min(COMMA_REACH, len(held))):
        if held[-1 - back][0] == comma:
            return len(held) - back
    return len(held)


def _framed(tokens: Sequence[tuple[int, float]], form: Format) -> Chunk:
    ids = (*form.prefix, *(token for token, _ in tokens), *form.suffix)
    weights = (*(1.0 for _ in form.prefix), *(weight for _, weight in tokens), *(1.0 for _ in form.suffix))
    left = form.length - len(ids)
    return Chunk(ids + (form.pad,) * left, weights + (1.0,) * left, len(ids))
