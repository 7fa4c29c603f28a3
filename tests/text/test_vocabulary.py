"""A tokenizer trained on captions."""

from __future__ import annotations

from pathlib import Path

import pytest

from carrara.text import Span, Vocabulary, parse
from tests.errors import refused

pytest.importorskip("tokenizers")

CAPTIONS = ["a red car", "a green car", "a red dog", "flag: Peru", "🙂 smiling face"]


def test_words_of_the_captions_are_single_ids_and_case_does_not_matter() -> None:
    words = Vocabulary.train(CAPTIONS * 5, 300, 16)
    assert len(words.tokenize("a red car")) == 3
    assert words.tokenize("A Red CAR") == words.tokenize("a red car")


def test_every_text_can_be_written() -> None:
    words = Vocabulary.train(CAPTIONS, 259, 64)
    for text in ("never seen: ẞ", "مرحبا", "\u2028", "🙃"):
        assert words.tokenize(text)


def test_prompts_have_one_length_and_are_cut() -> None:
    words = Vocabulary.train(CAPTIONS, 300, 6)
    for text in ("", "a", "a red car a red car a red car"):
        condition = words.encode([Span(text)])
        assert condition.tokens is not None
        assert condition.tokens.shape == (1, 6)
        assert condition.tokens.max() < len(words)
        assert condition.token_weights is None
    assert words.encode(parse("a (red:2) car")).token_weights is not None


def test_the_same_captions_give_the_same_words(tmp_path: Path) -> None:
    one, two = (Vocabulary.train(CAPTIONS, 300, 16) for _ in range(2))
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    texts = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert Vocabulary.load(one.config(), tmp_path / "one").tokenize("red dog") == one.tokenize("red dog")


def test_damaged_files_and_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with refused("missing"):
        Vocabulary.load({"length": 8}, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"cut": ')
    with refused("damaged"):
        Vocabulary.load({"length": 8}, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused("damaged"):
        Vocabulary.load({"length": 8}, tmp_path)
    with refused("invalid", key="conditioning.vocabulary"):
        Vocabulary.train(CAPTIONS, 100, 8)
    with refused("invalid", key="conditioning.length"):
        Vocabulary.train(CAPTIONS, 300, 2)
