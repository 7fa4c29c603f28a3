"""Orders beyond the plain shuffle: aspect-ratio buckets, and a few shards at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carrara.data import Batches, Preprocess, ShuffledShards, Source, aspect_buckets, open_source
from tests.data.builders import encoded, files, folder, picture, png, tarred
from tests.errors import refused

SHAPES = [(20, 20)] * 12 + [(20, 40)] * 9 + [(33, 24)] * 8 + [(60, 20)] * 2


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(folder(tmp_path / "set", {f"{i:02d}.png": png(i, *shape) for i, shape in enumerate(SHAPES)}))


def test_a_picture_goes_to_the_nearest_aspect(source: Source) -> None:
    buckets = aspect_buckets(source, (16, 16), batch_size=4, multiple=4)
    for (height, width), bucket in zip(SHAPES, buckets.bucket, strict=True):
        ratios = [abs(np.log(w / h) - np.log(width / height)) for h, w in buckets.sizes]
        assert ratios[bucket] == min(ratios)
    for height, width in buckets.sizes:
        assert height % 4 == width % 4 == 0
        assert height * width <= 16 * 16
        assert 0.5 <= width / height <= 2


def test_small_buckets_are_closed(source: Source) -> None:
    buckets = aspect_buckets(source, (16, 16), batch_size=9, multiple=4)
    assert min(map(len, buckets.members)) >= 9
    assert sum(map(len, buckets.members)) == len(SHAPES)
    whole = aspect_buckets(source, (16, 16), batch_size=len(SHAPES), multiple=4)
    assert len(whole.sizes) == 1


def test_turned_pictures_count_as_they_are_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder(tmp_path, {"a.png": encoded(picture(1, 20, 40), exif=exif), "b.png": png(2, 40, 20)})
    assert len(aspect_buckets(open_source(path), (16, 16), batch_size=2, multiple=4).sizes) == 1


def test_batches_are_of_one_size_and_hold_their_bucket(source: Source) -> None:
    order = aspect_buckets(source, (16, 16), batch_size=4, multiple=4)
    batches = Batches(source, Preprocess(16, 16), seed=1, batch_size=4, order=order)
    seen = set()
    for step in range(40):
        batch = batches.at(step)
        kinds = {order.sizes[order.bucket[int(name[:2])]] for name in batch.names}
        assert kinds == {tuple(batch.images.shape[2:])}
        seen |= kinds
    assert seen == set(order.sizes)


def test_bucketed_batches_are_functions_of_seed_and_step(source: Source) -> None:
    order = aspect_buckets(source, (16, 16), batch_size=4, multiple=4)
    prepare = Preprocess(16, 16, crop="random", flip=True)
    alone = Batches(source, prepare, seed=1, batch_size=4, order=order)
    parts = [
        Batches(source, prepare, 1, 4, rank=r, world=2, workers=w, cache="none", order=order).iterate(7)
        for r, w in ((0, 0), (1, 1))
    ]
    for step in range(7, 12):
        both = [next(part) for part in parts]
        assert torch.equal(torch.cat([b.images for b in both]), alone.at(step).images)


def test_a_round_visits_every_picture_about_equally(source: Source) -> None:
    order = aspect_buckets(source, (16, 16), batch_size=4, multiple=4)
    steps = int(order.round.sum())
    seen: Counter[int] = Counter()
    for step in range(steps):
        seen.update(order.select(3, np.arange(4 * step, 4 * step + 4)).index.tolist())
    assert set(seen) == set(range(len(SHAPES)))
    # round(8·n/4) batches of 4 are within half a batch of 8·n: 2 visits over n >= 4 pictures, and the
    # last permutation of a bucket may be cut: at most one visit more or less.
    assert min(seen.values()) >= 7
    assert max(seen.values()) <= 9


def test_an_unreadable_picture_is_replaced_from_its_bucket(tmp_path: Path) -> None:
    contents = {f"{i:02d}.png": png(i, *shape) for i, shape in enumerate(SHAPES[:21])}
    path = folder(tmp_path, contents)
    source = open_source(path, unreadable_limit=0.2)
    order = aspect_buckets(source, (16, 16), batch_size=4, multiple=4)
    (path / "20.png").write_bytes(b"")
    batches = Batches(source, Preprocess(16, 16), batch_size=4, cache="none", order=order)
    for step in range(20):
        batch = batches.at(step)
        assert {order.sizes[order.bucket[int(n[:2])]] for n in batch.names} == {tuple(batch.images.shape[2:])}
    assert list(source.unreadable) == [20]


def test_impossible_buckets_are_refused(source: Source) -> None:
    with refused("missing", key="training.batch_size"):
        aspect_buckets(source, (16, 16), batch_size=99)
    with refused("shape", key="data.resolution"):
        aspect_buckets(source, (4, 4), batch_size=2, multiple=8)
    with refused("mismatch", key="training.batch_size"):
        Batches(source, Preprocess(16, 16), batch_size=8, order=aspect_buckets(source, (16, 16), 4))
    with refused("mismatch", key="order"):
        Batches(source, Preprocess(16, 16), batch_size=8, order=ShuffledShards((10, 20)))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    mixed=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
)
def test_every_epoch_of_shards_visits_every_sample_once(sizes: list[int], mixed: int, seed: int, epoch: int) -> None:
    order = ShuffledShards(tuple(sizes), mixed)
    count = sum(sizes)
    positions = np.arange(count) + epoch * count
    whole = order.select(seed, positions).index
    assert np.array_equal(np.sort(whole), np.arange(count))
    cut = count // 2
    assert np.array_equal(order.select(seed, positions[cut:]).index, whole[cut:])


def test_only_a_few_shards_are_read_at_a_time() -> None:
    order = ShuffledShards((10,) * 20, mixed=4)
    shards = (order.select(1, np.arange(400)).index // 10).reshape(2, 5, 40)
    for epoch in shards:
        assert all(len(set(group.tolist())) == 4 for group in epoch)
    assert shards[0].tolist() != shards[1].tolist()


def test_shards_are_mixed_from_a_source(tmp_path: Path) -> None:
    for shard in range(4):
        tarred(tmp_path / f"{shard}.tar", {f"{k}.png": png(k) for k in range(5 * shard, 5 * shard + 5)})
    source = open_source(tmp_path)
    assert source.shard_sizes == (5, 5, 5, 5)
    batches = Batches(source, Preprocess(8, 8), batch_size=10, order=ShuffledShards(source.shard_sizes, mixed=2))
    for step in range(6):
        assert len({name.split("/")[0] for name in batches.at(step).names}) == 2
    assert open_source(folder(tmp_path / "f", files(2))).shard_sizes is None


@pytest.mark.parametrize(("sizes", "mixed"), [((), 1), ((3, 0), 1), ((3,), 0)])
def test_impossible_shards_are_refused(sizes: tuple[int, ...], mixed: int) -> None:
    with refused("invalid", key="mixed"):
        ShuffledShards(sizes, mixed)
