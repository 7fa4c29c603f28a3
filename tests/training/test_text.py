"""Training on captions: both kinds of encoder, from a folder to pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import carrara
from carrara import DiffusionModel
from carrara.recipe import Recipe, load, override, validate
from carrara.sampling import replay
from carrara.scorer import Scorer
from carrara.training.choose import recipe_for
from tests.errors import refused
from tests.runs import TINY, train
from tests.text import encoders

pytest.importorskip("transformers")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Plain squares, captioned with their colour."""
    folder = tmp_path / "squares"
    folder.mkdir()
    for index in range(24):
        word = list(COLOURS)[index % 3]
        pixels = np.full((8, 8, 3), COLOURS[word], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"a {word} square" if index % 2 else f"{word}")
    return folder


def recipe(folder: Path, *assignments: str) -> Recipe:
    own = (
        f"data.path={folder}",
        "data.resolution=8",
        "data.channels=3",
        "conditioning.kind=text",
        "network.attention=[2]",
        "network.context_channels=16",
        "sampling.guidance=1.5",
        "sampling.count=3",
    )
    return load("digits", [*TINY, *own, *assignments])


def test_an_encoder_trained_with_the_network(pictures: Path, tmp_path: Path) -> None:
    train(recipe(pictures), tmp_path / "run")
    model = DiffusionModel.load(tmp_path / "run")
    assert model.network.takes["tokens"] > 0  # type: ignore[index]
    one = model.sample(prompts=["a red square", "a (blue:1.3) square"], negative="green", guidance=2.0, steps=3)
    alone = model.sample(prompts=["a (blue:1.3) square"], negative="green", guidance=2.0, steps=3, first=1)
    torch.testing.assert_close(one.images[1:], alone.images, atol=1e-5, rtol=0)  # the rounding of batched sums
    one.save(tmp_path / "out")
    metadata = {**one.metadata, "row": 1, "texts": {name: texts[1] for name, texts in one.texts.items()}}
    assert torch.equal(model.sample(**replay(metadata)).images, alone.images)
    every, first = model.sample(prompts="red", count=2), model.sample(prompts=["red"])
    torch.testing.assert_close(every.images[:1], first.images, atol=1e-5, rtol=0)


def test_resumed_it_ends_in_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    train(recipe(pictures, "training.steps=5", "training.decay=constant"), tmp_path / "part")
    train(recipe(pictures, "training.decay=constant"), tmp_path / "part")
    train(recipe(pictures, "training.decay=constant"), tmp_path / "again")
    part, again = (DiffusionModel.load(tmp_path / name).network.state_dict() for name in ("part", "again"))
    assert all(torch.equal(part[name], again[name]) for name in again)


def test_a_frozen_encoder(pictures: Path, tmp_path: Path) -> None:
    encoders.bert(tmp_path / "bert")
    own = recipe(pictures, f"conditioning.encoder={tmp_path / 'bert'}", "conditioning.length=8")
    with refused("conflict", key="network.context_channels"):
        train(own, tmp_path / "wrong")
    settings = own.model_dump(exclude_none=True)
    settings["network"] = {k: v for k, v in settings["network"].items() if k != "context_channels"}
    train(validate(settings), tmp_path / "run")
    model = DiffusionModel.load(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "text_encoder" / "config.json").is_file()
    images = model.sample(prompts=["a red car", "", "dog BREAK cat"], steps=2, guidance=2.0).images
    assert images.isfinite().all()


@pytest.mark.slow
def test_it_learns_what_the_words_mean(pictures: Path, tmp_path: Path) -> None:
    """Guided towards a colour, squares have it: of three channels the right one is the brightest."""
    own = recipe(
        pictures, "training.steps=300", "training.learning_rate=4e-3", "network.channels=16", "training.ema=0.98"
    )
    train(own, tmp_path / "run")
    model = DiffusionModel.load(tmp_path / "run")
    words = [word for word in COLOURS for _ in range(4)]
    images = model.sample(prompts=[f"a {word} square" for word in words], guidance=2.0, steps=10).images
    brightest = images.mean((2, 3)).argmax(1)
    right = torch.tensor([list(COLOURS).index(word) for word in words])
    assert (brightest == right).float().mean() >= 0.9


def test_images_without_captions_are_refused(pictures: Path, tmp_path: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    with refused("mismatch", key="conditioning.kind"):
        train(recipe(pictures), tmp_path / "run")


def test_a_scorer_of_images_and_captions(pictures: Path, tmp_path: Path) -> None:
    own = (f"data.path={pictures}", "data.resolution=8", "training.steps=60", "training.batch_size=24")
    tiny = ("network.channels=8", "network.levels=2", "network.width=16", "network.text_width=16")
    training = {"learning_rate": 3e-3, "checkpoint_every": 30}
    data = {"name": "scorer", "kind": "scorer", "data": {}, "training": training}
    train(validate(override(data, [*own, *tiny, "encoders.vocabulary=300"])), tmp_path / "run")
    scorer = carrara.load(tmp_path / "run")
    assert isinstance(scorer, Scorer)
    pixels = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    images = pixels[:, :, None, None].expand(-1, -1, 8, 8)
    agreement = scorer.embed_images(images) @ scorer.embed_texts(list(COLOURS)).T
    assert agreement.argmax(1).tolist() == [0, 1, 2]
    with refused("conflict", key="training.micro_batch"):
        validate(override(data, [*own, "training.micro_batch=4"]))


def test_a_folder_with_captions_makes_a_model_of_texts(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, reasons = recipe_for(pictures)
    assert data["conditioning"] == {"kind": "text"}
    assert validate(data)
    assert any("captions" in reason for reason in reasons)
    monkeypatch.setattr("carrara.training.choose._reads_text", lambda: False)
    data, reasons = recipe_for(pictures)
    assert data["conditioning"] == {"kind": "none"}
    assert any("carrara[text]" in reason for reason in reasons)
