"""The cache of latents: exact, incremental, refused where stale, in the order of the images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from carrara import codecs, files
from carrara.cli.app import app
from carrara.codecs import (
    Autoencoder,
    Codec,
    Codes,
    DiagonalGaussian,
    DiscreteAutoencoder,
    DiscreteParams,
    HierarchicalVAE,
    Identity,
    KLAutoencoder,
    QuantiserParams,
    Tiled,
    VQAutoencoder,
    content_hash,
)
from carrara.data import Batches, LatentBatches, Preprocess, encode_latents, open_latents, open_source
from carrara.data.latent_index import INDEX, JOURNAL
from carrara.errors import Code, UserError
from carrara.networks.autoencoder import AutoencoderParams
from carrara.process import Noise
from tests.data import builders
from tests.errors import refused

PREPARE = Preprocess(8, 8, flip=True)
SHAPE = AutoencoderParams(channels=8, channel_mult=(1, 2), blocks_per_level=1, latent_channels=2, norm_groups=4)


class Toy(nn.Module):
    """A codec of the protocol and nothing else: means over 2×2 pixels, with a deviation that depends on the image."""

    kind = "toy"
    reduction = 2
    bounded = False

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.encoded = 0

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = shape
        if height % 2 or width % 2:
            raise UserError(f"{height}×{width} is not even.")
        return channels, height // 2, width // 2

    def encode(self, x: Tensor) -> DiagonalGaussian:
        assert not self.training
        self.encoded += len(x)
        mean = nn.functional.avg_pool2d(x, 2) * self.gain
        return DiagonalGaussian(mean, mean.abs().add(0.1).log())

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate(z / self.gain, scale_factor=2.0)


class Strange(Toy):
    """Its posterior is of a kind that nobody knows."""

    def encode(self, x: Tensor) -> Any:
        return object()


def learned(kind: str) -> Codec:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "toy": Toy,
        "identity": Identity,
        "autoencoder": lambda: Autoencoder(SHAPE),
        "kl": lambda: KLAutoencoder(SHAPE),
        "vq": lambda: VQAutoencoder(SHAPE, QuantiserParams(codes=16)),
        "discrete": lambda: DiscreteAutoencoder(SHAPE, DiscreteParams(codes=16)),
        "hierarchical": lambda: HierarchicalVAE([SHAPE, replace(SHAPE, in_channels=2, latent_channels=3)]),
    }
    codec: Codec = made[kind]()
    return codec.eval() if isinstance(codec, nn.Module) else codec


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """23 pictures in two classes."""
    return builders.folder(tmp_path / "images", builders.files(11, "a/{:03d}.png") | more(11, 12, "b"))


def more(first: int, count: int, where: str) -> dict[str, bytes | str]:
    return {f"{where}/{i:03d}.png": builders.png(i) for i in range(first, first + count)}


def direct(images: Path, codec: Codec, numbers: range, flip: bool = False) -> Any:
    """What the codec makes of some images without a cache."""
    source = open_source(images)
    pixels = torch.stack([PREPARE.resized(source.decode(n)[0]) for n in numbers]).float().mul(2 / 255).sub(1)
    with torch.no_grad():
        return codec.encode(pixels.flip(-1) if flip else pixels)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["toy", "identity", "autoencoder", "kl", "vq", "discrete", "hierarchical"])
def test_image_to_cache_to_image_is_direct_decoding_bit_for_bit(kind: str, images: Path, tmp_path: Path) -> None:
    codec = learned(kind)
    done = encode_latents(open_source(images), PREPARE, codec, tmp_path / "cache", batch_size=5, shard_images=10)
    assert (done.images, done.encoded, done.unreadable, done.shards) == (23, 23, 0, 3)
    latents = open_latents(tmp_path / "cache", content_hash(codec))
    assert latents.index.shape == codec.latent_shape((3, 8, 8))
    for start in range(0, 23, 5):  # the same batches, as kernels may round otherwise in others
        rows = range(start, min(start + 5, 23))
        for flip in (False, True):
            expected, stored = direct(images, codec, rows, flip), latents.posterior(rows, [flip] * len(rows))
            assert torch.equal(stored.mode(), expected.mode())
            noise = Noise(3).rows(rows)
            assert torch.equal(stored.sample(noise), expected.sample(noise))
            with torch.no_grad():
                assert torch.equal(codec.decode(stored.mode()), codec.decode(expected.mode()))
            if isinstance(expected, Codes):
                indices = latents.stored(rows, [flip] * len(rows))["indices"]
                assert torch.equal(indices.long(), expected.indices)


def test_draws_are_fresh_at_every_use(images: Path, tmp_path: Path) -> None:
    encode_latents(open_source(images), PREPARE, learned("kl"), tmp_path / "cache")
    batch = LatentBatches(open_latents(tmp_path / "cache"), batch_size=4).at(0)
    first, second = (batch.posterior.sample(Noise(0).rows(batch.positions).at(draw)) for draw in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("flip", [False, True])
def test_latents_come_in_the_order_of_images(flip: bool, images: Path, tmp_path: Path) -> None:
    (images / "a" / "broken.png").write_bytes(b"no picture")  # replaced by another, the same one in both
    source, codec = open_source(images, unreadable_limit=0.1), learned("identity")
    encode_latents(source, PREPARE, codec, tmp_path / "cache")
    prepare = replace(PREPARE, flip=flip)
    pictures = Batches(open_source(images, unreadable_limit=0.1), prepare, seed=7, batch_size=8)
    latents = open_latents(tmp_path / "cache", prepare=prepare)
    batches = LatentBatches(latents, seed=7, batch_size=8, flip=flip)
    for step, batch in zip(range(5), batches.iterate(), strict=False):
        expected = pictures.at(step)
        assert torch.equal(batch.posterior.mode(), expected.images)
        assert torch.equal(batch.positions, expected.positions)
        assert batch.names == expected.names
        assert batch.label is not None
        assert expected.label is not None
        assert torch.equal(batch.label, expected.label)
    halves = [LatentBatches(latents, seed=7, batch_size=8, rank=r, world=2, flip=flip).at(3) for r in (0, 1)]
    assert torch.equal(torch.cat([half.posterior.mode() for half in halves]), pictures.at(3).images)
    assert latents.class_names == source.class_names


def captioned(folder: Path, texts: list[str]) -> Path:
    rows = [{"file_name": f"{i:03d}.png", "text": text} for i, text in enumerate(texts)]
    return builders.folder(folder, builders.files(len(texts)) | {"metadata.jsonl": builders.jsonl(*rows)})


def test_captions_come_along(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "images", [f"number {i}" for i in range(6)])
    encode_latents(open_source(folder), PREPARE, learned("toy"), tmp_path / "cache")
    batch = LatentBatches(open_latents(tmp_path / "cache"), batch_size=3).at(0)
    assert batch.captions is not None
    assert [
        name.endswith(f"{int(text.split()[1]):03d}.png") for name, text in zip(batch.names, batch.captions, strict=True)
    ]


def test_latents_of_other_captions_or_class_names_are_refused(images: Path, tmp_path: Path) -> None:
    folder, cache = captioned(tmp_path / "captioned", ["one", "two", "three"]), tmp_path / "cache"
    encode_latents(open_source(folder), PREPARE, Toy(), cache)
    captioned(folder, ["one", "zwei", "drei"])
    with refused("mismatch", key="001.png"):
        open_latents(cache, source=open_source(folder))
    assert encode_latents(open_source(folder), PREPARE, Toy(), cache).encoded == 0
    assert open_latents(cache, source=open_source(folder)).captions == ["one", "zwei", "drei"]
    (folder / "metadata.jsonl").unlink()
    with refused("mismatch", key="000.png"):
        open_latents(cache, source=open_source(folder))

    source = open_source(images)
    encode_latents(source, PREPARE, Toy(), tmp_path / "classes")
    source.class_names = ("a", "c")
    with refused("mismatch", key=str(tmp_path / "classes")):
        open_latents(tmp_path / "classes", source=source)


def test_encoding_again_writes_nothing_and_new_images_alone_are_encoded(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode_latents(open_source(images), PREPARE, Toy(), cache, shard_images=10)
    before = files_of(cache)
    codec = Toy()
    assert encode_latents(open_source(images), PREPARE, codec, cache).encoded == 0
    assert files_of(cache) == before
    assert codec.encoded == 0
    assert codec.training  # as it was

    builders.folder(images, more(40, 2, "a"))  # two new, one changed, one moved, one gone, one twice
    (images / "a" / "000.png").write_bytes(builders.png(50))
    shutil.move(images / "a" / "001.png", images / "b" / "001.png")
    (images / "a" / "002.png").unlink()
    (images / "b" / "twice.png").write_bytes(builders.png(40))
    done = encode_latents(open_source(images), PREPARE, codec, cache)
    assert (done.images, done.encoded) == (25, 3)
    assert codec.encoded == 6  # with their mirror images
    latents = open_latents(cache, source=open_source(images))
    for number in range(25):
        expected = direct(images, codec.eval(), range(number, number + 1))
        torch.testing.assert_close(latents.posterior([number]).mode(), expected.mode())


def test_files_of_images_that_are_gone_are_removed(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode_latents(open_source(images), PREPARE, Toy(), cache, batch_size=5, shard_images=5)
    for i in range(11):
        (images / "a" / f"{i:03d}.png").unlink()
    encode_latents(open_source(images), PREPARE, Toy(), cache, batch_size=5, shard_images=5)
    assert sorted(path.name for path in cache.glob("latents-*")) == [f"latents-{i:05d}.safetensors" for i in (2, 3, 4)]
    assert len(open_latents(cache, source=open_source(images))) == 12


def test_an_interrupted_run_goes_on_where_it_was(images: Path, tmp_path: Path) -> None:
    class Stops(Toy):
        def encode(self, x: Tensor) -> DiagonalGaussian:
            if self.encoded >= 16:
                raise KeyboardInterrupt
            return super().encode(x)

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        encode_latents(open_source(images), PREPARE, Stops(), cache, batch_size=4, shard_images=4)
    with refused("missing", key=str(cache)):
        open_latents(cache)
    codec = Toy()
    assert encode_latents(open_source(images), PREPARE, codec, cache, batch_size=4).encoded == 15
    assert len(open_latents(cache)) == 23


class Interrupted(Toy):
    """It stops after two shards of five images."""

    def encode(self, x: Tensor) -> DiagonalGaussian:
        if self.encoded >= 20:
            raise KeyboardInterrupt
        return super().encode(x)


def test_the_index_is_written_whole_at_the_ends_and_a_line_for_each_shard(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def noted(path: Path, content: bytes) -> None:
        written.append(path.name)
        files.write_whole(path, content)

    monkeypatch.setattr("carrara.data.latent_index.write_whole", noted)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        encode_latents(open_source(images), PREPARE, Interrupted(), cache, batch_size=5, shard_images=5)
    lines = (cache / JOURNAL).read_text().splitlines()[1:]
    assert [len(json.loads(line)["keys"]) for line in lines] == [5, 5]
    assert written == [INDEX, JOURNAL]
    encode_latents(open_source(images), PREPARE, Toy(), cache, batch_size=5, shard_images=5)
    assert written == [INDEX, JOURNAL, INDEX, JOURNAL, INDEX]
    assert not (cache / JOURNAL).exists()
    one = tmp_path / "one"
    encode_latents(open_source(images), PREPARE, Toy(), one, batch_size=5, shard_images=5)
    assert (one / INDEX).read_bytes() == (cache / INDEX).read_bytes()


@pytest.mark.parametrize("end", ["whole", "a torn line", "of another index", "unreadable images"])
def test_what_a_journal_holds_counts_unless_it_is_torn_or_of_another_index(
    end: str, images: Path, tmp_path: Path
) -> None:
    cache, left = tmp_path / "cache", 13
    if end == "unreadable images":
        (images / "a" / "000.png").write_bytes(b"no picture")
    source = open_source(images, unreadable_limit=0.1)
    with pytest.raises(KeyboardInterrupt):
        encode_latents(source, PREPARE, Interrupted(), cache, batch_size=5, shard_images=5)
    journal = cache / JOURNAL
    if end == "a torn line":
        journal.write_bytes(journal.read_bytes()[:-9])
        left += 5
    elif end == "of another index":
        journal.write_text(f"{'0' * 32}\n" + journal.read_text().partition("\n")[2])
        left = 23
    with refused("missing", key=str(cache)):
        open_latents(cache)
    codec = Toy()
    again = open_source(images, unreadable_limit=0.1)
    assert encode_latents(again, PREPARE, codec, cache, batch_size=5).encoded == left
    latents = open_latents(cache, source=open_source(images))
    assert sorted(latents.unreadable) == ([0] if end == "unreadable images" else [])
    numbers = range(1, 23)
    torch.testing.assert_close(latents.posterior(numbers).mode(), direct(images, codec.eval(), numbers).mode())
    assert {path.name for path in cache.glob("latents-*")} == {shard.file for shard in latents.index.shards}


def test_a_second_process_that_encodes_into_a_cache_is_refused_before_it_reads_an_image(
    images: Path, tmp_path: Path
) -> None:
    cache, other = tmp_path / "cache", Toy()

    class Twice(Toy):
        def encode(self, x: Tensor) -> DiagonalGaussian:
            with refused("busy", key=str(cache)):
                encode_latents(open_source(images), PREPARE, other, cache)
            return super().encode(x)

    assert encode_latents(open_source(images), PREPARE, Twice(), cache).encoded == 23
    assert other.encoded == 0
    assert encode_latents(open_source(images), PREPARE, other, cache).encoded == 0


def test_damaged_caches_are_refused_and_repaired(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode_latents(open_source(images), PREPARE, Toy(), cache, batch_size=5, shard_images=10)
    shard = cache / "latents-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with refused("damaged", key=str(shard)):
        open_latents(cache)
    shard.unlink()
    with refused("damaged", key=str(shard)):
        open_latents(cache)
    assert encode_latents(open_source(images), PREPARE, Toy(), cache, batch_size=5).encoded == 10
    assert len(open_latents(cache, source=open_source(images))) == 23
    codes: dict[str, Code] = {"{": "damaged", "[]": "damaged", json.dumps({"format": 9}): "newer"}
    for text, code in codes.items():
        (cache / INDEX).write_text(text)
        with refused(code, key=str(cache / INDEX)):
            open_latents(cache)
    with refused("missing", key=str(tmp_path / "nowhere")):
        open_latents(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["header", "body", "one bit", "no checksum"])
def test_a_shard_whose_content_changed_is_refused_and_made_again(damage: str, images: Path, tmp_path: Path) -> None:
    """A file of the right size that cannot be read, or that can and has what no codec made."""
    cache = tmp_path / "cache"
    encode_latents(open_source(images), PREPARE, Toy(), cache, batch_size=5, shard_images=10)
    whole = open_latents(cache).posterior(range(23)).mode()
    shard = cache / "latents-00001.safetensors"
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    if damage == "header":
        content[:16] = 255
    elif damage == "body":
        content[-400:] = np.full(100, np.nan, np.float32).view(np.uint8)
    elif damage == "one bit":
        content[-1] ^= 1
    else:  # a cache of before there were any
        index = json.loads((cache / INDEX).read_text())
        del index["shards"][1]["checksum"]
        (cache / INDEX).write_text(json.dumps(index))
    shard.write_bytes(content.tobytes())
    with refused("damaged", key=str(shard)):
        open_latents(cache)
    assert encode_latents(open_source(images), PREPARE, Toy(), cache, batch_size=5).encoded == 10
    assert not shard.exists()
    assert torch.equal(open_latents(cache, source=open_source(images)).posterior(range(23)).mode(), whole)


def test_a_place_where_no_cache_can_be_is_refused_before_anything_is_encoded(images: Path, tmp_path: Path) -> None:
    taken, codec = tmp_path / "taken", Toy()
    taken.write_bytes(b"precious")
    for folder in (taken, taken / "below"):
        with refused("resources", key=str(folder)):
            encode_latents(open_source(images), PREPARE, codec, folder)
    assert codec.encoded == 0
    assert taken.read_bytes() == b"precious"


def test_a_codec_in_tiles_is_in_evaluation_mode_meanwhile(images: Path, tmp_path: Path) -> None:
    codec = Toy()
    assert codec.training
    encode_latents(open_source(images), PREPARE, Tiled(codec, tile=6, overlap=2), tmp_path / "cache")
    assert codec.encoded > 0  # which it asserts
    assert codec.training


def test_latents_of_another_codec_size_or_image_are_refused(images: Path, tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", Toy(2.0)
    encode_latents(open_source(images), PREPARE, Toy(), cache)
    with refused("mismatch", key=str(cache)):
        open_latents(cache, content_hash(other))
    with refused("mismatch", key=str(cache)):
        encode_latents(open_source(images), PREPARE, other, cache)
    changes: dict[str, Any]
    for changes, key in (
        ({"height": 16}, "data.resolution"),
        ({"resize": "box"}, "data.resize"),
    ):
        prepare = replace(PREPARE, **changes)
        with refused("mismatch", key=key):
            open_latents(cache, prepare=prepare)
        with refused("mismatch", key=key):
            encode_latents(open_source(images), prepare, Toy(), cache)
    assert open_latents(cache, prepare=replace(PREPARE, flip=False)).index.flips  # flips serve both
    (images / "b" / "015.png").write_bytes(builders.png(99))
    with refused("mismatch", key="b/015.png"):
        open_latents(cache, source=open_source(images))
    (images / "b" / "015.png").unlink()
    with refused("mismatch", key=str(cache)):
        open_latents(cache, source=open_source(images))


def test_what_cannot_be_cached_is_refused(images: Path, tmp_path: Path) -> None:
    source = open_source(images)
    with refused("conflict", key="data.crop"):
        encode_latents(source, replace(PREPARE, crop="random"), Toy(), tmp_path / "cache")
    with pytest.raises(UserError, match="is not even"):
        encode_latents(source, replace(PREPARE, height=7), Toy(), tmp_path / "cache")
    with refused("unsupported", key="codec"):
        encode_latents(source, PREPARE, Strange(), tmp_path / "cache")
    with refused("not_finite", key="a/000.png"):
        encode_latents(source, PREPARE, Toy(float("nan")), tmp_path / "cache")
    encode_latents(source, replace(PREPARE, flip=False), Toy(), tmp_path / "plain")
    plain = open_latents(tmp_path / "plain")
    with refused("mismatch", key="data.flip"):
        open_latents(tmp_path / "plain", prepare=PREPARE)
    for call in (lambda: LatentBatches(plain, batch_size=4, flip=True), lambda: plain.stored([0], [True])):
        with refused("mismatch", key="data.flip"):
            call()
    with refused("missing", key="training.batch_size"):
        LatentBatches(plain, batch_size=24)
    with refused("invalid", key="training.batch_size"):
        LatentBatches(plain, batch_size=8, world=3)


def test_unreadable_images_are_counted_against_the_limit_and_tried_once(images: Path, tmp_path: Path) -> None:
    for i in range(3):
        (images / "a" / f"{i:03d}.png").write_bytes(b"no picture" + bytes([i]))
    with refused("damaged", key="data.unreadable_limit"):
        encode_latents(open_source(images, unreadable_limit=0.05), PREPARE, Toy(), tmp_path / "cache")
    done = encode_latents(open_source(images, unreadable_limit=0.2), PREPARE, Toy(), tmp_path / "cache")
    assert (done.encoded, done.unreadable) == (0, 3)
    latents = open_latents(tmp_path / "cache")
    assert set(latents.unreadable) == {0, 1, 2}
    with refused("missing", key="a/000.png"):
        latents.posterior([0])


def test_the_digits_keep_their_seventeen_levels(tmp_path: Path) -> None:
    prepare = Preprocess(8, 8, channels=1)
    encode_latents(open_source("digits"), prepare, Identity(), tmp_path / "cache")
    latents = open_latents(tmp_path / "cache")
    pictures = Batches(open_source("digits"), prepare, batch_size=32).at(0)
    assert torch.equal(LatentBatches(latents, batch_size=32).at(0).posterior.mode(), pictures.images)
    assert latents.index.levels == 17


def test_the_command_encodes_and_reports(images: Path, tmp_path: Path) -> None:
    codec = learned("kl")
    codecs.save(codec, tmp_path / "codec")
    arguments = ["data", "encode", str(images), "--codec", str(tmp_path / "codec"), "--resolution", "8", "--flip"]
    for expected in (23, 0):
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cache"), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["encoded"] == expected
    plain = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cache")])
    assert "23 images, 0 encoded now" in plain.stdout
    rows = range(23)
    stored = open_latents(tmp_path / "cache", content_hash(codec)).posterior(rows)
    assert torch.equal(stored.mode(), direct(images, codec, rows).mode())
    for device in ("cuda:99", "gpu"):
        failed = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cache"), "--device", device])
        assert isinstance(failed.exception, UserError)
        assert (failed.exception.key, failed.exception.code) == ("device", "unsupported")
    arguments[4] = str(tmp_path / "nowhere")
    failed = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cache")])
    assert isinstance(failed.exception, UserError)
    assert failed.exception.code == "missing"
