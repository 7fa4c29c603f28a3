"""Texts as a condition: rows, null forms, negatives, dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from carrara import conditioning
from carrara.condition import Condition
from carrara.conditioning import DataFacts, NullForm, Text, TrainingInputs
from carrara.process import Noise
from carrara.text import Pretrained, Vocabulary
from tests.errors import refused
from tests.text import encoders

pytest.importorskip("transformers")

CAPTIONS = ["a red car", "a green car", "a red dog"]


@pytest.fixture(params=["clip", "bert", "trained"])
def text(request: pytest.FixtureRequest, tmp_path: Path) -> Text:
    if request.param == "trained":
        return Text(Vocabulary.train(CAPTIONS, 300, 12), 0.5)
    getattr(encoders, request.param)(tmp_path)
    return Text(Pretrained.open(tmp_path, length=16 if request.param == "bert" else 77), 0.5)


def rows(count: int) -> Noise:
    return Noise(0).rows(range(count))


def equal(one: Condition, other: Condition) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[slot], b[slot]) for slot in a)


def test_a_prompt_is_the_same_alone_and_among_others(text: Text) -> None:
    prompts = ["a red car", "", "a (dog:1.4)", "a cat BREAK a dog"]
    together = text.encode({"prompts": prompts}, rows(4))
    for index, prompt in enumerate(prompts):
        alone = text.encode({"prompts": [prompt]}, rows(1)).tensors()
        row = together.rows(slice(index, index + 1)).tensors()
        for slot in ("context", "tokens"):
            if slot in alone:
                own = alone[slot]
                assert torch.equal(row[slot][:, : own.shape[1]], own)
                if slot == "context" and own.shape[1] < row[slot].shape[1]:  # the rest is masked
                    assert not row["context_mask"][:, own.shape[1] :].any()


def test_the_null_form_is_the_empty_text(text: Text) -> None:
    condition = text.encode({"prompts": ["a red car", "a dog"]}, rows(2))
    empty = text.encode({"prompts": ["", ""]}, rows(2))
    assert equal(text.null(condition), empty)
    assert equal(text.null(empty), empty)


def test_the_null_form_fits_longer_prompts_and_emphasis(text: Text) -> None:
    condition = text.encode({"prompts": ["(a:1.3) car BREAK a dog", "a"]}, rows(2))
    null = text.null(condition)
    Condition.join([condition, null])
    empty = text.encode({"prompts": [""]}, rows(1)).tensors()
    for slot in ("context", "tokens"):
        if slot in empty:
            assert torch.equal(null.tensors()[slot][:1, : empty[slot].shape[1]], empty[slot])


def test_a_negative_takes_the_place_of_the_empty_text(text: Text) -> None:
    given = {"prompts": ["a red car", "a dog"], "negative": ["a cat"]}
    condition = text.encode(given, rows(2))
    null = NullForm((text,)).null(condition)
    assert equal(null, text.encode({"prompts": ["a cat"]}, rows(2)))
    part = condition.rows(slice(1, 2)).to("cpu")
    assert equal(text.null(part), text.encode({"prompts": ["a cat"]}, rows(1)))
    longer = text.encode({"prompts": ["a"], "negative": ["a cat BREAK a dog"]}, rows(1))
    Condition.join([longer, text.null(longer)])


def test_captions_are_read_as_they_are(text: Text) -> None:
    caption = "a (red:2) car"
    inputs = TrainingInputs(captions=[caption])
    plain = text.examples(inputs, rows(1))
    assert not equal(plain, text.encode({"prompts": [caption]}, rows(1)))
    escaped = r"a \(red:2\) car"
    assert equal(plain, text.encode({"prompts": [escaped]}, rows(1)))


def test_each_caption_is_dropped_on_its_own(text: Text) -> None:
    examples = text.examples(TrainingInputs(captions=["a dog"] * 64), rows(64))
    dropped = conditioning.drop([text], examples, rows(64), 64)
    empty = text.encode({"prompts": [""]}, rows(1)).tensors()
    slot = next(iter(empty))
    gone = (dropped.tensors()[slot] == empty[slot]).flatten(1).all(1)
    assert 16 < int(gone.sum()) < 48


def test_a_model_folder_holds_it(text: Text, tmp_path: Path) -> None:
    text.save(tmp_path / "model")
    again = conditioning.build({"kind": "text", **text.config()}, tmp_path / "model")
    assert equal(again.encode({"prompts": ["a dog"]}, rows(1)), text.encode({"prompts": ["a dog"]}, rows(1)))


def test_bad_inputs_are_refused(text: Text) -> None:
    with refused("missing", key="prompts"):
        conditioning.encode([text], {}, rows(1))
    with refused("invalid", key="prompts"):
        conditioning.encode([text], {"prompts": ["a", 3]}, rows(2))
    with refused("shape", key="negative"):
        text.encode({"prompts": ["a"] * 3, "negative": ["b", "c"]}, rows(3))
    with refused("missing", key="data.path"):
        text.examples(TrainingInputs(), rows(1))


def test_fit_reads_the_captions() -> None:
    data = DataFacts("icons", (3, 8, 8), None, CAPTIONS)
    found = Text.fit({"dropout": 0.1}, data)
    assert isinstance(found.encoder, Vocabulary)
    assert found.encoder.length == 5
    with refused("mismatch", key="conditioning.kind"):
        Text.fit({"dropout": 0.1}, DataFacts("icons", (3, 8, 8)))
