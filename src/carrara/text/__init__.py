"""From prompts to what a network reads: the prompt syntax, chunks of tokens, and encoders."""

from carrara.text.chunks import Chunk, Format, chunks
from carrara.text.encoder import TextEncoder
from carrara.text.pretrained import WORDS, Pretrained, Reading, emphasise
from carrara.text.prompts import Span, parse
from carrara.text.vocabulary import Vocabulary

ENCODERS: dict[str, type[TextEncoder]] = {Pretrained.kind: Pretrained, Vocabulary.kind: Vocabulary}
"""The kinds of encoder that saved models may name."""

__all__ = [
    "ENCODERS",
    "WORDS",
    "Chunk",
    "Format",
    "Pretrained",
    "Reading",
    "Span",
    "TextEncoder",
    "Vocabulary",
    "chunks",
    "emphasise",
    "parse",
]
