"""What a run makes of latents: draws in training, modes in previews, and no cache but the right one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from carrara import codecs
from carrara.codecs import Codec, DiagonalGaussian, KLAutoencoder
from carrara.data import LatentBatch, Preprocess, Source, encode, encode_latents, latents, open_source
from carrara.data.latent_index import damaged_shard
from carrara.distributed import start
from carrara.errors import UserError
from carrara.networks.autoencoder import AutoencoderParams
from carrara.process import Noise
from carrara.recipe import Recipe
from carrara.training import Trainer
from carrara.training.codec import CodecTask
from tests.data.builders import encoded, files, folder
from tests.processes import together
from tests.runs import tiny_recipe
from tests.training.test_codec import recipe

SHAPE = AutoencoderParams(channels=8, channel_mult=(1, 2), blocks_per_level=1, latent_channels=2, norm_groups=4)
IMAGES = 24
SPREAD = 3.0


def wide(seed: int = 0, spread: float = SPREAD) -> KLAutoencoder:
    """A codec whose posteriors all have one deviation: of `SPREAD`, a draw is nowhere near the mode."""
    torch.manual_seed(seed)
    codec = KLAutoencoder(SHAPE).eval()
    last = codec.encoder.map
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    with torch.no_grad():
        last.weight[SHAPE.latent_channels :] = 0
        last.bias[SHAPE.latent_channels :] = 2 * math.log(spread)
    return codec


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return folder(tmp_path / "pictures", files(IMAGES, "a/{:03d}.png"))


@pytest.fixture
def codec(tmp_path: Path) -> KLAutoencoder:
    """A wide codec, saved as `codec`."""
    made = wide()
    codecs.save(made, tmp_path / "codec")
    return made


def latent_recipe(tmp_path: Path, *assignments: str) -> Recipe:
    """A run in the latents of `codec`."""
    data = (f"data.path={tmp_path / 'pictures'}", "data.channels=3", "conditioning.kind=none", "sampling.guidance=1")
    network = ("network.channel_mult=[1]", "network.attention=[1]")
    return tiny_recipe(*data, *network, f"codec.path={tmp_path / 'codec'}", *assignments)


def cached(pictures: Path, codec: Codec, cache: Path, prepare: Preprocess) -> str:
    """Make a cache; the recipe's word for it."""
    encode_latents(open_source(pictures), prepare, codec, cache, batch_size=8)
    return f"codec.cache={cache}"


@pytest.mark.parametrize("from_cache", [False, True])
def test_training_draws_from_the_posterior_anew_at_every_use(
    from_cache: bool, pictures: Path, codec: KLAutoencoder, tmp_path: Path
) -> None:
    cache = [cached(pictures, codec, tmp_path / "cache", Preprocess(8, 8))] if from_cache else []
    trainer = Trainer(latent_recipe(tmp_path, *cache), tmp_path / "run")
    drawn: dict[str, list[Tensor]] = {}
    for step in range(3):  # of 16, over 24 images: two epochs
        batch = trainer.batches.at(step)
        if isinstance(batch, LatentBatch):
            posterior = batch.posterior
        else:
            posterior = codec.encode(batch.images)
        assert isinstance(batch, LatentBatch) is from_cache
        assert isinstance(posterior, DiagonalGaussian)
        noise = (trainer.examples(batch).x0 - posterior.mode()) / SPREAD
        for name, row in zip(batch.names, noise.detach(), strict=True):
            drawn.setdefault(name, []).append(row)
    assert [len(draws) for draws in drawn.values()] == [2] * IMAGES
    first, second = (torch.stack([draws[epoch] for draws in drawn.values()]).flatten() for epoch in (0, 1))
    # 768 standard normal numbers each: four standard errors of a deviation, and of a correlation
    for epoch in (first, second):
        assert float(epoch.std()) == pytest.approx(1, abs=4 / (2 * len(epoch)) ** 0.5)
    assert abs(float((first * second).mean())) < 4 / len(first) ** 0.5
    trainer.run.close()


def hashed(tmp_path: Path) -> tuple[int, int, int]:
    """How many shards and images this process reads and hashes when a run on cached latents starts, and decodes."""
    counts = Counter[str]()

    def counting(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            counts[name] += name != "shards" or arguments[-1] is True
            return honest(*arguments)

        return counted

    vars(latents)["damaged_shard"] = counting("shards", damaged_shard)
    encode.file_hash = counting("images", encode.file_hash)
    decode = Source.decode
    Source.decode = counting("decoded", Source.decode)  # type: ignore[method-assign]
    trainer = Trainer(latent_recipe(tmp_path, f"codec.cache={tmp_path / 'cache'}"), tmp_path / "run")
    assert len(trainer.batches.at(0)) == 16 // trainer.processes.world
    trainer.run.close()
    Source.decode = decode  # type: ignore[method-assign]
    return counts["shards"], counts["images"], counts["decoded"]


def test_one_process_hashes_for_all_and_none_decodes_an_image(
    pictures: Path, codec: KLAutoencoder, tmp_path: Path
) -> None:
    cached(pictures, codec, tmp_path / "cache", Preprocess(8, 8))
    assert together(2, hashed, tmp_path) == [(1, IMAGES, 0), (0, 0, 0)]


def test_latents_are_the_same_draws_from_images_and_from_the_cache(
    pictures: Path, codec: KLAutoencoder, tmp_path: Path
) -> None:
    cache = cached(pictures, codec, tmp_path / "cache", Preprocess(8, 8))
    direct, stored = (
        Trainer(latent_recipe(tmp_path, *words), tmp_path / name) for name, words in (("i", ()), ("l", (cache,)))
    )
    for step in range(3):
        made = [trainer.examples(trainer.batches.at(step)).x0 for trainer in (direct, stored)]
        # images are encoded in other batches than the cache's, which rounds the last bits
        torch.testing.assert_close(made[0], made[1], atol=1e-5, rtol=0)
    direct.run.close()
    stored.run.close()


def test_a_run_refuses_the_cache_of_another_codec_size_or_crop(
    pictures: Path, codec: KLAutoencoder, tmp_path: Path
) -> None:
    own = cached(pictures, codec, tmp_path / "own", Preprocess(8, 8))
    for assignments, sentence in (
        ((cached(pictures, wide(1), tmp_path / "other", Preprocess(8, 8)),), r"those of the codec .* not of"),
        ((cached(pictures, codec, tmp_path / "larger", Preprocess(16, 16)),), r"data\.resolution = 16×16, not 8×8"),
        ((cached(pictures, codec, tmp_path / "box", Preprocess(8, 8, resize="box")),), r"data\.resize = box, not adm"),
        ((own, "data.crop=random"), r"data\.crop = center, not random"),
        ((own, "data.flip=true"), r"data\.flip = False, not True"),
    ):
        with pytest.raises(UserError, match=sentence):
            Trainer(latent_recipe(tmp_path, *assignments), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    Trainer(latent_recipe(tmp_path, own), tmp_path / "run").run.close()


def codec_task(pictures: Path, batch_size: int) -> CodecTask:
    made = recipe("kl", data={"path": str(pictures), "channels": 3}, training={"batch_size": batch_size})
    return CodecTask(made, open_source(pictures), start())


def test_the_latent_scale_is_measured_on_all_of_a_small_data_set(pictures: Path, tmp_path: Path) -> None:
    """Batches of 4 that differ: one of them says little of the others."""
    for number in range(IMAGES):  # from black to white
        gray = Image.new("RGB", (12, 12), (round(255 * number / (IMAGES - 1)),) * 3)
        folder(pictures, {f"a/{number:03d}.png": encoded(gray)})
    task, codec = codec_task(pictures, 4), wide(spread=1e-6)  # so that the spread is that of the images
    task.save(codec, tmp_path / "saved", "")
    loaded = codecs.load(tmp_path / "saved")
    source, prepare = open_source(pictures), Preprocess(8, 8)
    pixels = torch.stack([prepare.resized(source.decode(n)[0]) for n in range(IMAGES)]).float().mul(2 / 255).sub(1)
    with torch.no_grad():
        latents = loaded.encode(pixels).mode()
    assert float(latents.std(correction=0)) == pytest.approx(1, rel=1e-4)  # float32 sums over other batches


def test_a_preview_shows_what_becomes_of_the_mode(pictures: Path) -> None:
    task, codec = codec_task(pictures, 4), wide().train()
    picture, _ = task.preview(codec, range(3))
    assert codec.training
    image, again = picture.chunk(2, dim=3)
    codec.eval()
    with torch.no_grad():
        posterior = codec.encode(image)
        torch.testing.assert_close(again, codec.decode(posterior.mode()).clamp(-1, 1), atol=1e-6, rtol=0)
        drawn = codec.decode(posterior.sample(Noise(0).rows(range(3)))).clamp(-1, 1)
    assert float((drawn - again).abs().mean()) > 1e-2  # a draw would have shown
