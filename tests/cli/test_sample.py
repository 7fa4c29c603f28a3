"""`carrara sample` with a user's own pictures to enlarge, and with a codec whose decoder learned on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from carrara import codecs
from carrara.images import from_uint8, save_png
from carrara.model import DiffusionModel
from tests.cli.conftest import Command
from tests.runs import tiny_recipe, train
from tests.training.test_codec import recipe, started


def gray(folder: Path, count: int, side: int = 4) -> Path:
    """A folder of random gray pictures."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def pixels_of(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture))


def test_ones_own_pictures_are_enlarged(
    carrara: Command, refused: Callable[..., str], upsampler_run: Path, tmp_path: Path
) -> None:
    own = gray(tmp_path / "own", 3)
    words = ("upscale", upsampler_run, own, "--steps", "2", "--out", tmp_path / "s", "--overwrite")
    result = carrara(*words, own / "0.png", "--noise-level", "0.2", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["count"], printed["noise_level"]) == (4, 0.2)
    pictures = [own / f"{number}.png" for number in (0, 1, 2, 0)]
    small = from_uint8(torch.stack([pixels_of(path) for path in pictures])[..., None])
    made = DiffusionModel.load(upsampler_run).sample(low_res=small, noise_level=0.2, steps=2)
    for row, image in enumerate(made.images):
        save_png(image, tmp_path / "expected.png")
        assert torch.equal(pixels_of(tmp_path / "s" / f"seed0-{row:05d}.png"), pixels_of(tmp_path / "expected.png"))
    old = ("sample", upsampler_run, "--steps", "2", "--small", own, "--small", own / "0.png", "--small-noise", "0.2")
    before = pixels_of(tmp_path / "s" / "seed0-00001.png")
    moved = carrara(*old, "--out", tmp_path / "old", "--json")  # the spelling of the last release
    assert json.loads(moved.stdout) == {**printed, "folder": str(tmp_path / "old")}
    assert "carrara upscale" in moved.stderr
    assert torch.equal(pixels_of(tmp_path / "old" / "seed0-00001.png"), before)
    assert json.loads(carrara(*words, "--json", "-n", "2").stdout)["count"] == 2
    assert not (tmp_path / "s" / "seed0-00002.png").exists()
    assert "--count 4" in refused(*words, "-n", "4")
    assert "at least 1" in refused(*words, "-n", "-1")
    assert "noise_level" in refused(*words, "--noise-level", "0.4")
    assert "0.png is 4×4" in refused(*words, gray(tmp_path / "wide", 1, side=5))
    assert "1×4×4, not 1×5×5" in refused("upscale", upsampler_run, tmp_path / "wide")
    (own / "0.png").write_bytes(b"")
    assert "0.png cannot be read: the file is empty" in refused("upscale", upsampler_run, own / "0.png")


def test_a_cascade_is_trained_and_sampled(
    carrara: Command, refused: Callable[..., str], upsampler_run: Path, tmp_path: Path
) -> None:
    """A base model of 4×4 images, and an up-sampler behind it that is conditioned on their noise."""
    base = ("data.resolution=4", "network.attention=[1]", "network.channel_mult=[1]", "training.steps=2")
    train(tiny_recipe(*base, "training.sample_every=100", "sampling.count=1"), tmp_path / "base")
    words = ("sample", tmp_path / "base", "--steps", "2", "-l", "3", "-l", "4", "--out", tmp_path / "s")
    result = carrara(*words, "--upsampler", upsampler_run, "--upsampler-steps", "3", "--small-noise", "0.1", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["noise_level"], printed["steps"], printed["count"]) == (0.1, 3, 2)
    assert pixels_of(tmp_path / "s" / "seed0-00001.png").shape == (8, 8)
    assert pixels_of(tmp_path / "s" / "base" / "seed0-00001.png").shape == (4, 4)
    late = (*words[:-1], tmp_path / "late", "--upsampler")
    assert "noise_level" in refused(*late, upsampler_run, "--small-noise", "0.9")
    assert "low_res" in refused(*late, tmp_path / "base")
    assert not (tmp_path / "late").exists()  # refused before the base model has worked in vain
    assert "--small-noise" in refused(*words, "--small-noise", "0.1")
    assert "low_res" in refused(*words, "--small", tmp_path / "s" / "base" / "seed0-00001.png")


def test_an_up_sampler_of_classes_wants_them_named(
    carrara: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    train(tiny_recipe("upsampling.factor=2", "training.steps=2", "sampling.count=1"), tmp_path / "run")
    words = ("upscale", tmp_path / "run", gray(tmp_path / "own", 3), "--steps", "2", "--json")
    assert "--label" in refused(*words)
    assert json.loads(carrara(*words, "-l", "5").stdout)["labels"] == [5, 5, 5]
    plain = ("data.resolution=4", "network.attention=[1]", "network.channel_mult=[1]", "conditioning.kind=none")
    base = tiny_recipe(*plain, "sampling.guidance=1", "training.steps=2", "training.sample_every=100")
    train(base, tmp_path / "base")
    late = ("sample", tmp_path / "base", "--upsampler", tmp_path / "run", "--out", tmp_path / "late")
    assert "needs labels" in refused(*late)
    assert not (tmp_path / "late").exists()


def test_a_decoder_learns_on_and_decodes_from_the_command_line(
    carrara: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    train(recipe("vqgan", codec={"codes": 16}), tmp_path / "codec")
    latent = ("network.channel_mult=[1]", "network.attention=[1]")
    train(tiny_recipe(f"codec.path={tmp_path / 'codec'}", *latent), tmp_path / "run")
    late = {"adversarial": 0.5, "start": 10**6}
    fine_tuning = started(tmp_path / "codec", "decoder", loss=late, discriminator={"layers": 1, "channels": 8})
    (tmp_path / "decoder.yaml").write_text(yaml.safe_dump(fine_tuning.model_dump(mode="json", exclude_none=True)))
    trained = carrara("train", tmp_path / "decoder.yaml", "--out", tmp_path / "tuned")
    assert trained.returncode == 0, trained.stderr
    assert "the decoder alone" in trained.stdout
    assert "! the discriminator starts after 1,000,000 images" in trained.stdout
    words = ("sample", tmp_path / "run", "--steps", "2", "-l", "1", "--out", tmp_path / "s", "--json")
    result = carrara(*words, "--codec", tmp_path / "tuned")
    assert result.returncode == 0, result.stderr
    tuned = codecs.load(tmp_path / "tuned" / "model")
    assert codecs.content_hash(tuned) in json.loads(result.stdout)["weights"]
    train(recipe("vq", codec={"codes": 16}, data={"split": "test"}), tmp_path / "other")
    sentence = refused(*words, "--codec", tmp_path / "other")
    assert codecs.content_hash(codecs.load(tmp_path / "other" / "model")) in sentence
    assert codecs.content_hash(DiffusionModel.load(tmp_path / "run").codec) in sentence
    assert "own" in refused(*words, "--codec", tmp_path / "own")


@pytest.mark.parametrize("words", [("--set", "codec.learn=decoder"), ("--set", "upsampling.factor=2")])
def test_a_codec_without_a_start_has_no_decoder_to_learn_on(
    refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    data = recipe().model_dump(mode="json", exclude_none=True)
    (tmp_path / "codec.yaml").write_text(yaml.safe_dump(data))
    sentence = refused("train", tmp_path / "codec.yaml", *words, "--out", tmp_path / "run")
    assert "codec.learn" in sentence or "upsampling" in sentence
