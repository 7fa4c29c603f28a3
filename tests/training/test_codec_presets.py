"""Codecs of published shapes, and what a recipe's length and a codec's age decide of its codebook."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara import codecs
from carrara.codecs import DiscreteAutoencoder, QuantiserParams, VQAutoencoder
from carrara.objectives.codec import LOSSES
from carrara.presets.published_codecs import PRESETS, PUBLISHED, on_meta
from carrara.recipe import CodecRecipe, validate
from carrara.training import Trainer
from carrara.training.codec import make_codec, make_loss
from tests.errors import refused
from tests.runs import train
from tests.training.test_codec import recipe, started


def published(preset: str, channels: int = 3, /, **codec: Any) -> CodecRecipe:
    """A run that trains a published shape."""
    base = recipe().model_dump(include={"name", "kind", "loss", "training", "sampling"})
    data = {"path": "digits", "resolution": 8, "channels": channels}
    made = validate({**base, "data": data, "codec": {"preset": preset, **codec}})
    assert isinstance(made, CodecRecipe)
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_codec_of_the_published_config(name: str) -> None:
    """In every key and shape; but for the loss of a new codebook, and for annealing as long as the run."""
    theirs = on_meta(PUBLISHED[name])
    made = published(name, theirs.params.in_channels)
    with torch.device("meta"):
        ours = make_codec(made)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    expected = theirs.config()
    if isinstance(theirs, VQAutoencoder):
        assert expected["quantiser"]["legacy"]
        expected["quantiser"]["legacy"] = False
    if isinstance(theirs, DiscreteAutoencoder):
        expected["choice"]["anneal"] = 153
    assert ours.config() == expected
    rung = {"kl": "kl", "vq": "vqgan", "discrete": "gumbel"}[ours.kind]
    # `published` has no discriminator, and nothing to look through
    assert make_loss(made, ours) == replace(LOSSES[rung], perceptual=0.0, adversarial=0.0)
    chosen = published(name, theirs.params.in_channels, kind=rung)
    with torch.device("meta"):
        assert make_codec(chosen).config() == ours.config()


def test_every_published_first_stage_of_pictures_is_a_preset() -> None:
    assert set(PUBLISHED) - set(PRESETS) == {name for name in PUBLISHED if "segmentation" in name}
    document = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in document] == []


def test_a_preset_changed_in_single_keys_trains(tmp_path: Path) -> None:
    small = {"channels": 8, "blocks_per_level": 1, "latent_channels": 2}
    trainer = Trainer(published("ldm-vq-f4", 1, codes=16, restart=0.1, **small), tmp_path)
    assert trainer.summary()["codec"] == "ldm-vq-f4"
    list(trainer.steps())
    codec = codecs.load(tmp_path / "model")
    assert isinstance(codec, VQAutoencoder)
    assert codec.quantiser.params == QuantiserParams(codes=16, restart=0.1, decay=None)
    assert codec.params.channel_mult == (1, 2, 4)  # still of the preset
    assert codec.latent_shape((1, 8, 8)) == (2, 2, 2)


def test_presets_that_are_none_are_refused() -> None:
    for name, codec, code, key in (
        ("ldm-kl-f9", {}, "unknown", "codec.preset"),
        ("vqgan-ade20k-segmentation-f16-1024", {}, "unknown", "codec.preset"),
        ("ldm-kl-f4", {"kind": "vae"}, "unknown", "codec.preset"),
        ("ldm-kl-f4", {"kind": "vqgan"}, "unknown", "codec.preset"),
        ("ldm-kl-f4", {"codes": 16}, "unknown", "codec.codes"),
        ("ldm-kl-f4", {"in_channels": 3}, "conflict", "codec.in_channels"),
        ("vqgan-f16-1024", {"legacy": True}, "unknown", "codec.legacy"),
        ("vqgan-gumbel-f8-8192", {"temperature": 2.0, "anneal": 0}, "conflict", "codec.temperature"),
    ):
        with refused(code, key):  # type: ignore[arg-type]
            published(name, **codec)


@pytest.mark.parametrize("kind", ["dvae", "gumbel"])
def test_the_choice_of_codes_hardens_over_four_fifths_of_the_run(kind: str, tmp_path: Path) -> None:
    made = recipe(kind, codec={"codes": 16}, training={"log_every": 1})
    train(made, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    seen = [line["terms"]["temperature"] for line in lines]
    assert len(seen) == 12
    assert seen[0] > 0.95
    assert seen == sorted(seen, reverse=True)
    assert (
        seen[-4] > seen[-3] == seen[-1] == 1 / 16
    )  # 153 of 192 images, of which a step sees 16: within the tenth step
    codec = codecs.load(tmp_path / "model")
    assert isinstance(codec, DiscreteAutoencoder)
    assert codec.choice.anneal == 153
    assert (codec.log_scale is not None) is (kind == "dvae")


def test_what_is_said_of_annealing_holds() -> None:
    for given, anneal, temperature in (
        ({"anneal": 64}, 64, 1.0),
        ({"anneal": 0}, 0, 1.0),
        ({"temperature": 2}, 153, 2.0),
    ):
        codec = make_codec(recipe("dvae", codec=given))
        assert isinstance(codec, DiscreteAutoencoder)
        assert (codec.choice.anneal, codec.choice.temperature) == (anneal, temperature)
    with refused("conflict", "codec.temperature"):
        make_codec(recipe("dvae", codec={"temperature": 2.0, "anneal": 0}))


def test_a_new_codebook_never_has_the_loss_of_old_weights(tmp_path: Path) -> None:
    with refused("unknown", "codec.legacy"):
        make_codec(recipe("vq", codec={"legacy": True, "decay": None}))
    quantiser = {"codes": 16, "legacy": True, "decay": None}
    codecs.save(codecs.build({"kind": "vq", "params": {"channels": 8}, "quantiser": quantiser}), tmp_path)
    loaded = make_codec(started(tmp_path, None))
    assert isinstance(loaded, VQAutoencoder)
    assert loaded.quantiser.params.legacy
