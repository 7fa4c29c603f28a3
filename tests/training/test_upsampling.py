"""Runs that train up-samplers: what they are made for, told, shown and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from carrara import codecs
from carrara.conditioning import LowRes, shrink
from carrara.data import Batches, Preprocess, open_source
from carrara.data.encode import encode_latents
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.recipe import Recipe
from carrara.training import Trainer
from tests.data.builders import files, folder
from tests.processes import together
from tests.runs import tiny_recipe, train
from tests.training.test_codec import recipe as codec_recipe
from tests.training.test_loop import assert_same_bits
from tests.training.test_start import fine_tuning

FACTOR = ("upsampling.factor=2", "upsampling.noise=0.3")
UNTOLD = ("conditioning.kind=none", "sampling.guidance=1", *FACTOR)


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Images and what is left of them at half their size."""
    images = Batches(open_source("digits"), Preprocess(8, 8, 1), 1, count).at(0).images
    return images, shrink(images, 2)


def test_the_model_says_what_it_was_trained_for(upsampler_run: Path) -> None:
    model = DiffusionModel.load(upsampler_run)
    low_res = model.low_res
    assert low_res is not None
    assert low_res.augmentation is not None
    assert (low_res.factor, low_res.augmentation.fraction) == (2, 0.3)
    params: Any = model.network.params
    assert (params.concat_channels, params.upsample_concat, params.vector_channels) == (1, True, 1)
    _, small = digits(3)
    made = model.sample(low_res=small, steps=2, seed=4)
    assert made.images.shape == (3, 1, 8, 8)
    assert "noise_level" not in made.metadata
    noisy = model.sample(low_res=small, steps=2, seed=4, noise_level=0.3)
    assert noisy.metadata["noise_level"] == 0.3
    assert not torch.equal(noisy.images, made.images)
    alone = model.sample(low_res=small[2:], steps=2, seed=4, noise_level=0.3, first=2)
    # the noise is the same to the bit; matrix products of another batch size round differently
    torch.testing.assert_close(alone.images[0], noisy.images[2], atol=2e-5, rtol=0)


def test_it_resumes_to_the_bit(upsampler_run: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(*UNTOLD)
    for progress in Trainer(recipe, tmp_path).steps():
        if progress.step == 7:  # left unfinished, after the checkpoint of step 5
            break
    train(recipe, tmp_path)
    assert_same_bits(upsampler_run, tmp_path, 12)


def losses(folder: Path) -> list[float]:
    return [progress.loss for progress in train(tiny_recipe(*FACTOR, "training.steps=3"), folder)]


def test_two_processes_take_the_same_steps(tmp_path: Path) -> None:
    alone = losses(tmp_path / "alone")
    for walk in together(2, losses, tmp_path / "together"):
        # the same samples with the same noise; sums of two halves round differently
        assert walk == pytest.approx(alone, rel=1e-4)


def test_a_preview_shows_small_sample_and_image(upsampler_run: Path) -> None:
    with Image.open(upsampler_run / "samples" / "step-00000012-ema.png") as sheet:
        assert '"middle": "sample"' in sheet.info["carrara"]
        width, height = sheet.size
    assert width > 2 * height  # ten pictures in four columns and three rows, each three times as wide as high


def test_it_learns_which_image_the_small_one_comes_from(tmp_path: Path) -> None:
    """Samples shrunk again are nearer to their own small image than to any other one's."""
    words = ("training.steps=150", "training.batch_size=32", "training.learning_rate=3e-3", "training.ema=0.9")
    quiet = ("training.sample_every=1000", "training.checkpoint_every=1000", "training.tracker=none")
    train(tiny_recipe(*UNTOLD, *words, *quiet, "network.channels=16", "sampling.count=1"), tmp_path)
    _, small = digits(16)
    made = DiffusionModel.load(tmp_path).sample(low_res=small, steps=10)
    again = shrink(made.images, 2)
    distances = (again[:, None] - small[None]).square().flatten(2).mean(2)
    nearest = distances.argmin(1) == torch.arange(16)
    assert int(nearest.sum()) >= 12  # by chance one of them would be
    assert float(distances.diagonal().mean()) < 0.25 * float(distances.mean())


def test_a_class_and_a_small_image_are_told_together(tmp_path: Path) -> None:
    train(tiny_recipe(*FACTOR, "training.validate_every=6", "training.validation_images=16"), tmp_path)
    model = DiffusionModel.load(tmp_path)
    _, small = digits(2)
    plain, guided, nothing = (model.sample([3, 7], low_res=small, steps=2, guidance=g).images for g in (1.0, 2.0, 0.0))
    assert not torch.equal(plain, guided)
    assert not torch.equal(plain, nothing)
    other = model.sample([3, 7], low_res=-small, steps=2, guidance=0.0).images
    assert not torch.equal(nothing, other)  # without a class there still is a small image


def latent(codec: Path, *words: str) -> Recipe:
    """An up-sampler in a codec's latents."""
    return tiny_recipe(*UNTOLD, f"codec.path={codec}", "network.channel_mult=[1]", "network.attention=[1]", *words)


def test_latents_of_the_large_image_from_the_pixels_of_the_small_one(tmp_path: Path) -> None:
    train(codec_recipe("autoencoder"), tmp_path / "codec")
    trainer = Trainer(latent(tmp_path / "codec"), tmp_path / "run")
    assert trainer.summary()["enlarges"] == "4×4, 2 times, with noise up to 0.3"
    assert trainer.summary()["latent"].startswith("2×4×4 of the autoencoder codec")
    list(trainer.steps())
    model = DiffusionModel.load(tmp_path / "run")
    _, small = digits(2)
    made = model.sample(low_res=small, steps=2)
    assert (made.images.shape, made.latents.shape) == ((2, 1, 8, 8), (2, 2, 4, 4))
    deep = codec_recipe("autoencoder", codec={"channel_mult": [1, 1, 2]})
    train(deep, tmp_path / "deep")
    with pytest.raises(UserError, match=r"4 times smaller, .* set upsampling\.factor to 4 or more"):
        Trainer(latent(tmp_path / "deep", "network.blocks_per_level=1"), tmp_path / "a")


def test_a_cache_without_pixels_is_refused(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "pictures", files(16, "{:03d}.png"))
    data = {"path": str(pictures), "resolution": 8, "channels": 3}
    train(codec_recipe("autoencoder", data=data), tmp_path / "codec")
    codec = codecs.load(tmp_path / "codec" / "model")
    encode_latents(open_source(str(pictures)), Preprocess(8, 8, 3), codec, tmp_path / "cache")
    words = (f"data.path={pictures}", "data.channels=3", f"codec.cache={tmp_path / 'cache'}")
    with pytest.raises(UserError, match=r"codec\.cache holds no pixels"):
        Trainer(latent(tmp_path / "codec", *words), tmp_path / "run")


def test_buckets_have_sides_that_can_be_shrunk(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "pictures", files(32, "{:03d}.png"))
    words = (f"data.path={pictures}", "data.channels=3", "data.resolution=12", "upsampling.factor=3")
    trainer = Trainer(tiny_recipe(*UNTOLD, *words, "data.buckets=auto", "training.steps=1"), tmp_path / "run")
    assert all(side % 6 == 0 for size in trainer.batches.order.sizes for side in size)  # type: ignore[attr-defined]
    list(trainer.steps())


def test_an_up_sampler_learns_on_as_what_it_is(upsampler_run: Path, tmp_path: Path) -> None:
    untold = {"conditioning": {"kind": "none"}}
    tuned = fine_tuning(upsampler_run, **untold)
    train(tuned, tmp_path / "run")
    base, after = (DiffusionModel.load(run) for run in (upsampler_run, tmp_path / "run"))
    assert [c.config() for c in after.conditioners] == [c.config() for c in base.conditioners]
    assert base.low_res is not None
    assert not torch.equal(after.network.state_dict()["out.weight"], base.network.state_dict()["out.weight"])
    with pytest.raises(UserError, match="upsampling follows from the model"):
        fine_tuning(upsampler_run, **untold, upsampling={"factor": 2})
    replace(base, conditioners=(LowRes(base.shape),)).save(tmp_path / "foreign")
    with pytest.raises(UserError, match="does not say what it was trained for"):
        Trainer(fine_tuning(tmp_path / "foreign", **untold), tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("upsampling.factor=3",), "images of 8×8 cannot be shrunk 3 times: 6×6 can"),
        (("upsampling.factor=1",), "'upsampling.factor' is 1"),
        (("upsampling.noise=1.5",), "'upsampling.noise' is 1.5"),
        (("upsampling.factr=2",), "unknown key 'upsampling.factr': did you mean 'factor'"),
        (("network.concat_channels=1",), "network.concat_channels follows from"),
        (("network.vector_channels=0",), "network.vector_channels follows from"),
        (("network.upsample_concat=true",), "network.upsample_concat follows from"),
        (("kind=classifier", "conditioning.kind=none"), "it is for kind diffusion"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_recipe(*UNTOLD, *words)
    assert sentence in str(error.value)
