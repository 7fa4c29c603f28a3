"""Batches are functions of (seed, step): of processes, workers, caches and restarts independent."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.data import Batch, Batches, Preprocess, Source, one_ahead, open_source, shuffled_index
from carrara.data.batches import normalised
from carrara.data.workers import in_order
from carrara.errors import UserError
from tests.data.builders import Contents, files, folder, pixels, png, tarred
from tests.errors import refused

RANDOM = Preprocess(8, 8, crop="random", flip=True)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    contents: Contents = {}
    for i in range(20):
        contents[f"{i:02d}.png"] = png(i, 10 + i % 5, 11)
        contents[f"{i:02d}.txt"] = f"no {i}"
    return open_source(folder(tmp_path / "set", contents))


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.positions, b.positions)
        and a.captions == b.captions
        and a.names == b.names
        and (a.label is None if b.label is None else a.label is not None and torch.equal(a.label, b.label))
    )


def test_a_batch_holds_the_samples_of_its_positions(source: Source) -> None:
    batch = Batches(source, Preprocess(8, 8), seed=3, batch_size=7).at(4)
    assert batch.positions.tolist() == list(range(28, 35))
    expected = shuffled_index(3, np.arange(28, 35), 20)
    assert batch.captions == [f"no {i}" for i in expected]
    for image, index in zip(batch.images, expected.tolist(), strict=True):
        prepared = Preprocess(8, 8)(source[index].image)
        assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), prepared)
    assert batch.images.dtype == torch.float32
    assert len(batch) == 7


def test_the_range_is_minus_one_to_one(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (0, 255, 51)).save(tmp_path / "a.png")
    image = Batches(open_source(tmp_path), Preprocess(4, 4), batch_size=1).at(0).images[0]
    # 51 · 2/255 - 1 = -0.6: one rounding of float32.
    assert image[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6], abs=1e-7)


def test_digits_are_exact_sixteenths() -> None:
    source = open_source("digits")
    batch = Batches(source, Preprocess(8, 8, 1), batch_size=100).at(0)
    values = (batch.images + 1) * 8
    assert torch.equal(values, values.round())
    assert set(batch.images.unique().tolist()) == {v / 8 - 1 for v in range(17)}
    assert batch.label is not None
    assert batch.label.dtype == torch.int64


def test_enlarged_digits_stay_in_range() -> None:
    source = open_source("digits")
    images = Batches(source, Preprocess(16, 16, 1), batch_size=64).at(0).images
    assert images.min() >= -1
    assert images.max() <= 1


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("prepare", [Preprocess(8, 8), RANDOM], ids=["center", "random"])
def test_any_number_of_processes_sees_the_same_samples(source: Source, world: int, prepare: Preprocess) -> None:
    alone = Batches(source, prepare, seed=1, batch_size=12).at(5)
    parts = [Batches(source, prepare, seed=1, batch_size=12, rank=r, world=world).at(5) for r in range(world)]
    assert torch.equal(torch.cat([part.images for part in parts]), alone.images)
    assert torch.cat([part.positions for part in parts]).tolist() == alone.positions.tolist()
    assert list(itertools.chain(*(part.names for part in parts))) == alone.names


@pytest.mark.parametrize("prepare", [Preprocess(8, 8), RANDOM], ids=["center", "random"])
def test_cache_workers_and_starting_point_change_nothing(source: Source, prepare: Preprocess) -> None:
    reference = Batches(source, prepare, seed=9, batch_size=6)
    for workers in (0, 2):
        other = Batches(source, prepare, seed=9, batch_size=6, workers=workers, cache="none")
        stream = other.iterate(3)
        for step in range(3, 9):
            assert same(next(stream), reference.at(step))
    for step, batch in zip(range(2, 5), reference.iterate(2), strict=False):
        assert same(batch, reference.at(step))


def test_a_micro_batch_of_positions_is_a_part_of_the_whole(source: Source) -> None:
    whole, half = (Batches(source, RANDOM, seed=2, batch_size=size) for size in (8, 4))
    assert torch.equal(whole.at(3).images, torch.cat([half.at(6).images, half.at(7).images]))


def test_augmentation_changes_from_epoch_to_epoch(source: Source) -> None:
    batches = Batches(source, RANDOM, seed=0, batch_size=20)
    views: dict[str, set[bytes]] = {}
    for step in range(6):
        batch = batches.at(step)
        for name, image in zip(batch.names, batch.images, strict=True):
            views.setdefault(name, set()).add(image.numpy().tobytes())
    # 6 draws of at least 3·4·2 views: all six equal for any of 20 pictures has probability 20·24^-5.
    assert min(map(len, views.values())) > 1


def test_seeds_give_other_orders(source: Source) -> None:
    first, second = (Batches(source, Preprocess(8, 8), seed=seed, batch_size=20).at(0).names for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_sources_travel_to_other_processes(source: Source) -> None:
    copy = pickle.loads(pickle.dumps(Batches(source, RANDOM, batch_size=4)))
    assert same(copy.at(1), Batches(source, RANDOM, batch_size=4).at(1))


def decoded_by(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pictures that are decoded from now on."""
    decoded: list[int] = []
    decode = Source.decode

    def counting(self: Source, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        decoded.append(index)
        return decode(self, index)

    monkeypatch.setattr(Source, "decode", counting)
    return decoded


@pytest.mark.parametrize("prepare", [Preprocess(8, 8), RANDOM], ids=["center", "random"])
def test_kept_pictures_are_decoded_once_and_not_before_they_are_used(
    source: Source, prepare: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = decoded_by(monkeypatch)
    kept, fresh = (Batches(source, prepare, batch_size=6, cache=cache) for cache in ("auto", "none"))
    assert decoded == []
    first = [kept.at(step) for step in range(10)]
    assert sorted(decoded) == list(range(20))
    assert all(same(fresh.at(step), batch) for step, batch in enumerate(first))
    assert len(decoded) == 20 + 60


def test_what_does_not_fit_is_kept_on_request_alone(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carrara.data.batches._AUTO_BYTES", 20 * 3 * 8 * 8 - 1)
    decoded = decoded_by(monkeypatch)
    for cache, times in (("auto", 2), ("memory", 1)):
        decoded.clear()
        batches = Batches(source, Preprocess(8, 8), batch_size=20, cache=cache)  # type: ignore[arg-type]
        assert same(batches.at(0), batches.at(0))
        assert len(decoded) == times * 20


class Counted:
    """A batch that knows where it is."""

    def __init__(self, number: int, device: str = "cpu") -> None:
        self.number, self.device = number, device

    def to(self, device: torch.device) -> Counted:
        return Counted(self.number, device.type)

    def pinned(self) -> Counted:
        raise AssertionError("only CUDA reads pinned memory")


def test_one_batch_is_read_while_the_one_before_is_used() -> None:
    numbers: list[int] = []
    closed = threading.Event()

    def read() -> Generator[Counted]:
        try:
            for number in range(3):
                numbers.append(number)
                yield Counted(number)
            raise UserError("the shard is gone", code="missing")
        finally:
            closed.set()

    ahead = one_ahead(read(), torch.device("meta"))
    for number in range(2):
        batch = next(ahead)
        assert (batch.number, batch.device) == (number, "meta")
        deadline = time.monotonic() + 20
        while len(numbers) < number + 2:  # without a request
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert numbers == list(range(number + 2))
    assert next(ahead).number == 2  # what follows has failed already: raised where it is due
    with refused("missing"):
        next(ahead)
    assert closed.is_set()


def test_what_reads_ahead_is_closed_with_its_reader() -> None:
    closed = threading.Event()

    def read() -> Generator[Counted]:
        try:
            for number in itertools.count():
                time.sleep(0.01)
                yield Counted(number)
        finally:
            closed.set()

    for device in ("meta", "cpu"):
        closed.clear()
        ahead = one_ahead(read(), torch.device(device))
        assert [next(ahead).number for _ in range(3)] == [0, 1, 2]
        ahead.close()
        assert closed.is_set()


def test_pixels_travel_as_bytes_and_become_the_same_floats(source: Source) -> None:
    batch = Batches(source, Preprocess(8, 8), batch_size=20).at(0)
    assert batch.pixels.dtype == torch.uint8
    every = torch.arange(256, dtype=torch.uint8)
    for num_values in (256, 17):
        # float32 all along, as NumPy rounds it: multiply, then subtract.
        expected = np.minimum(np.arange(256), num_values - 1).astype(np.float32) * np.float32(2 / (num_values - 1))
        assert torch.equal(normalised(every, num_values), torch.from_numpy(expected - np.float32(1)))
    assert every.max() == 255  # the pixels are left as they are
    moved = batch.to(torch.device("meta"))
    assert (moved.pixels.device.type, moved.images.dtype) == ("meta", torch.float32)


def broken(path: Path) -> Source:
    return open_source(folder(path, {**files(30), "007.png": b"", "019.png": b"junk"}), unreadable_limit=0.1)


def test_substitutes_do_not_depend_on_cache_workers_or_processes(tmp_path: Path) -> None:
    reference = [Batches(broken(tmp_path), RANDOM, batch_size=10).at(step) for step in range(6)]
    names = {name for batch in reference for name in batch.names}
    assert not names & {"007.png", "019.png"}
    source = broken(tmp_path)
    stream = Batches(source, RANDOM, batch_size=10, workers=2, cache="none").iterate()
    assert all(same(next(stream), batch) for batch in reference)
    assert sorted(source.unreadable.values()) == ["no image that Pillow can read", "the file is empty"]
    parts = [Batches(broken(tmp_path), RANDOM, batch_size=10, rank=r, world=2, cache="none").at(1) for r in (0, 1)]
    assert torch.equal(torch.cat([part.images for part in parts]), reference[1].images)


def test_only_the_position_of_the_bad_picture_changes(tmp_path: Path) -> None:
    whole = Batches(open_source(folder(tmp_path / "a", files(30))), RANDOM, batch_size=30).at(0)
    holed = Batches(broken(tmp_path / "b"), RANDOM, batch_size=30).at(0)
    changed = [a for a, b in zip(whole.names, holed.names, strict=True) if a != b]
    assert sorted(changed) == ["007.png", "019.png"]


class TestMidRun:
    """Faults that strike after training has begun."""

    def test_an_image_that_becomes_unreadable_is_named_and_replaced(self, tmp_path: Path) -> None:
        path = folder(tmp_path, files(40))
        source = open_source(path, unreadable_limit=0.05)
        batches = Batches(source, Preprocess(8, 8), batch_size=10, cache="none")
        before = batches.at(1)
        (path / before.names[3]).write_bytes(b"")
        (path / before.names[5]).unlink()
        after = batches.at(1)
        assert [i for i in range(10) if before.names[i] != after.names[i]] == [3, 5]
        assert sorted(source.unreadable.values()) == ["No such file or directory", "the file is empty"]
        assert before.names[3] in source.warnings[0]
        (path / before.names[7]).unlink()
        with refused("damaged", key="data.unreadable_limit"):
            batches.at(1)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_shard_that_vanishes_stops_the_run_by_name(self, tmp_path: Path, workers: int) -> None:
        for shard in range(2):
            tarred(tmp_path / f"{shard}.tar", {f"{k}.png": png(k) for k in range(6 * shard, 6 * shard + 6)})
        batches = Batches(open_source(tmp_path), Preprocess(8, 8), batch_size=12, workers=workers, cache="none")
        batches.at(0)
        (tmp_path / "1.tar").unlink()
        with pytest.raises(UserError, match=r"the shard .*1\.tar is gone: put it back, then continue\.$"):
            next(batches.iterate(1))

    def test_killed_workers_are_replaced_and_nothing_is_lost(self, source: Source) -> None:
        reference = Batches(source, RANDOM, batch_size=5)
        stream = Batches(source, RANDOM, batch_size=5, workers=2, cache="none").iterate()
        for step in range(30):
            if step == 4:
                for child in multiprocessing.active_children():
                    assert child.pid is not None
                    os.kill(child.pid, signal.SIGKILL)
            assert same(next(stream), reference.at(step))

    def test_workers_killed_while_they_write_do_not_hang_the_run(self) -> None:
        # Each result fills a pipe's 64 KiB a hundred times, so that a worker spends most of its time writing.
        ahead = in_order(_large, 0, workers=2)
        for item in range(24):
            if item % 3 == 1:
                time.sleep(0.003 * (item % 5))
                for child in multiprocessing.active_children():
                    assert child.pid is not None
                    os.kill(child.pid, signal.SIGKILL)
            assert next(ahead) == _large(item)

    def test_a_batch_that_kills_every_worker_is_reported(self) -> None:
        ahead = in_order(_dies_at_2, 0, workers=1)
        with refused("resources", key="data.workers"):
            list(itertools.islice(ahead, 10))

    def test_workers_leave_with_their_killed_parent(self, tmp_path: Path) -> None:
        script = (
            "import os, signal\n"
            "from carrara.data.workers import in_order\n"
            "ahead = in_order(lambda i: os.getpid(), 0, 1); print(next(ahead), flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert run.returncode == -signal.SIGKILL
        worker = int(run.stdout.split()[-1])
        deadline = time.monotonic() + 20
        while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, "the worker outlived its parent"
            time.sleep(0.1)


def test_an_error_in_a_worker_carries_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a data worker failed:.*_divides.*ZeroDivisionError"):
        next(in_order(_divides, 0, workers=1))


def test_results_come_in_order_whatever_their_time() -> None:
    assert list(itertools.islice(in_order(_takes_a_while, 5, workers=3), 12)) == list(range(5, 17))


def test_an_open_iterator_does_not_disturb_the_end_of_the_program() -> None:
    script = "from carrara.data.workers import in_order; ahead = in_order(abs, 0, 2); print(next(ahead), next(ahead))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 1\n", "")


def _divides(item: int) -> float:
    return 1 / item


def _large(item: int) -> bytes:
    return bytes([item]) * 2**23


def _takes_a_while(item: int) -> int:
    time.sleep(0.02 * (item % 3))
    return item


def _dies_at_2(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_shards_and_folder_give_the_same_pictures(tmp_path: Path) -> None:
    folder(tmp_path / "f", files(12))
    tarred(tmp_path / "t" / "0.tar", files(12))
    one, other = (Batches(open_source(tmp_path / kind), RANDOM, batch_size=12).at(0) for kind in "ft")
    assert torch.equal(one.images, other.images)


def test_many_channels_of_one_source(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, files(4)))
    for channels in (1, 3, 4):
        assert Batches(source, Preprocess(6, 9, channels), batch_size=4).at(0).images.shape == (4, channels, 6, 9)
    assert np.array_equal(pixels(0), np.asarray(source[0].image))
