"""Frozen encoders: what is read of them, on small random ones in the real layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.text import Pretrained, Span, emphasise, parse
from tests.errors import refused
from tests.text import encoders

pytest.importorskip("transformers")


def reference(folder: Path, text: str, length: int) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


@pytest.mark.parametrize("make", [encoders.clip, encoders.bert, encoders.t5])
def test_a_plain_prompt_is_what_the_encoder_says(make: Callable[[Path], Any], tmp_path: Path) -> None:
    model = make(tmp_path)
    encoder = Pretrained.open(tmp_path, length=32)
    ids = reference(tmp_path, "a red cat, a dog", 32)
    found = encoder.encode([Span("a red cat, a dog")])
    mask = ids.attention_mask if encoder.reading.mask else None
    right = model(input_ids=ids.input_ids, attention_mask=mask).last_hidden_state
    assert found.context is not None
    torch.testing.assert_close(found.context, right)
    if encoder.reading.mask:
        assert found.context_mask is not None
        assert torch.equal(found.context_mask, ids.attention_mask.bool())
    else:
        assert found.context_mask is None
    assert encoder.slots == {"context": right.shape[2]}


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("final_norm", [True, False])
def test_layers_are_counted_from_the_last(layer: int, final_norm: bool, tmp_path: Path) -> None:
    """AUTOMATIC1111's clip skip n: hidden[-n], then the final norm."""
    model = encoders.clip(tmp_path)
    encoder = Pretrained.open(tmp_path, layer=layer, final_norm=final_norm)
    ids = reference(tmp_path, "a cat", 77).input_ids
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-layer]
    right = model.final_layer_norm(hidden) if final_norm or layer == 1 else hidden
    torch.testing.assert_close(encoder.encode([Span("a cat")]).context, right)


def test_the_pooled_output_is_the_projected_one_where_there_is_one(tmp_path: Path) -> None:
    model = encoders.clip(tmp_path, projected=True)
    encoder = Pretrained.open(tmp_path, pooled=True)
    ids = reference(tmp_path, "a cat", 77).input_ids
    found = encoder.encode([Span("a cat")])
    torch.testing.assert_close(found.vector, model(input_ids=ids).text_embeds)
    assert encoder.slots == {"context": 16, "vector": 8}


def test_old_folders_with_a_prefix_read_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    encoders.clip(tmp_path)
    before = Pretrained.open(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    prefixed = {"text_model." + name.removeprefix("text_model."): value for name, value in state.items()}
    save_file(prefixed, tmp_path / "model.safetensors", {"format": "pt"})
    after = Pretrained.open(tmp_path)
    assert after.hash == before.hash
    assert torch.equal(after.encode([Span("a cat")]).context, before.encode([Span("a cat")]).context)  # type: ignore[arg-type]


def test_half_precision_files_are_read_in_float32(tmp_path: Path) -> None:
    encoders.clip(tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in Pretrained.open(tmp_path).model.parameters()} == {torch.float32}


def test_long_prompts_are_chunks_side_by_side(tmp_path: Path) -> None:
    encoders.clip(tmp_path)
    encoder = Pretrained.open(tmp_path)
    first, second = (encoder.encode([Span(" ".join([word] * 75))]).context for word in ("cat", "dog"))
    both = encoder.encode([Span(" ".join(["cat"] * 75 + ["dog"] * 75))]).context
    assert first is not None
    assert second is not None
    torch.testing.assert_close(both, torch.cat([first, second], dim=1))


def test_emphasis_scales_tokens_and_keeps_the_mean(tmp_path: Path) -> None:
    encoders.clip(tmp_path)
    encoder = Pretrained.open(tmp_path)
    plain = encoder.encode([Span("a cat")]).context
    strong = encoder.encode(parse("a (cat:1.5)")).context
    assert plain is not None
    assert strong is not None
    right = plain.clone()
    right[:, 2] *= 1.5  # start, a, cat
    right *= plain.mean() / right.mean()
    torch.testing.assert_close(strong, right)
    hidden = torch.randn(2, 3, 4)
    assert emphasise(hidden, torch.ones(2, 3), True) is hidden


def test_a_model_holds_its_encoder(tmp_path: Path) -> None:
    encoders.bert(tmp_path / "bert")
    encoder = Pretrained.open(tmp_path / "bert", layer=2)
    encoder.save(tmp_path / "model")
    again = Pretrained.load(encoder.config(), tmp_path / "model")
    assert again.reading == encoder.reading
    assert torch.equal(again.encode([Span("a cat")]).context, encoder.encode([Span("a cat")]).context)  # type: ignore[arg-type]
    encoders.bert(tmp_path / "model" / "text_encoder", initializer_range=0.5)
    with refused("mismatch", key="encoder"):
        Pretrained.load(encoder.config(), tmp_path / "model")


def test_what_is_no_text_encoder_is_refused(tmp_path: Path) -> None:
    with refused("missing", key="encoder"):
        Pretrained.open(tmp_path / "nowhere")
    encoders.bert(tmp_path)
    with refused("invalid", key="encoder.layer"):
        Pretrained.open(tmp_path, layer=3)
    with refused("invalid", key="encoder.length"):
        Pretrained.open(tmp_path, length=2)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with refused("damaged"):
        Pretrained.open(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with refused("unsupported", key="encoder"):
        Pretrained.open(tmp_path)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(tmp_path: Path) -> None:
    encoders.bert(tmp_path, vocab_size=8)
    with refused("mismatch", key="encoder"):
        Pretrained.open(tmp_path)
