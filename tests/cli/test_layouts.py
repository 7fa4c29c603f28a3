"""From a data set as it lies there to samples, whatever its layout: it trains, resumes to the same bits, samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.data.builders import files, folder, jsonl, png, tarred

COUNT = 12
SMALL = ("--resolution", "8", "--batch-size", "4", "--json")
SETS = (
    "network.channels=8",
    "network.head_channels=8",
    "sampling.steps=2",
    "training.tracker=none",
    "sampling.count=2",
)
WORDS = (*SMALL, *(word for assignment in SETS for word in ("--set", assignment)))


def class_folder(root: Path) -> Path:
    """Pictures of several sizes, high and wide."""
    return folder(root, {f"{'cat' if i % 2 else 'dog'}/{i}.png": png(i, 9 + i, 20 - i) for i in range(COUNT)})


def side_texts(root: Path) -> Path:
    return folder(root, {**files(COUNT), **{f"{i:03d}.txt": f"picture {i}" for i in range(COUNT)}})


def metadata(root: Path) -> Path:
    rows = [{"file_name": f"{i:03d}.png", "text": f"picture {i}"} for i in range(COUNT)]
    return folder(root, {**files(COUNT), "metadata.jsonl": jsonl(*rows)})


def shards(root: Path) -> Path:
    for number in range(3):
        keys = range(number * 4, number * 4 + 4)
        samples = {f"{i:04d}.png": png(i) for i in keys} | {f"{i:04d}.cls": str(i % 2) for i in keys}
        tarred(root / f"{number:05d}.tar", samples)
    return root


def parquet(root: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    rows = {"image": [{"bytes": png(i)} for i in range(COUNT)], "label": [i % 3 for i in range(COUNT)]}
    pq.write_table(pa.table(rows), root / "train.parquet")
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], Path], int, bool]] = {
    "class folder": (class_folder, 2, False),
    "images with texts": (side_texts, 0, True),
    "metadata.jsonl": (metadata, 0, True),
    "tar shards": (shards, 2, False),
    "parquet": (parquet, 3, False),
}
"""By layout: how to make one, how many classes it has, and whether it has captions."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_resumes_and_samples(layout: str, tmp_path: Path, carrara: Command) -> None:
    make, classes, captioned = LAYOUTS[layout]
    data = make(tmp_path / "data")
    straight = carrara("train", data, "--out", tmp_path / "straight", *WORDS, "--steps", "4")
    assert straight.returncode == 0, straight.stderr
    start = json.loads(straight.stdout.splitlines()[0])["start"]
    assert start["classes"] == classes
    assert ("texts" in start) == captioned

    assert carrara("train", data, "--out", tmp_path / "broken", *WORDS, "--steps", "2").returncode == 0
    resumed = carrara("train", data, "--out", tmp_path / "broken", *WORDS, "--steps", "4")
    assert "resuming from the checkpoint of step 2" in resumed.stdout
    for name in ("network", "ema"):
        parts = ("checkpoints", "step-00000004", f"{name}.safetensors")
        assert tmp_path.joinpath("broken", *parts).read_bytes() == tmp_path.joinpath("straight", *parts).read_bytes()

    given = ("--label", "1") if classes else ("--prompt", "picture 3") if captioned else ()
    made = carrara("sample", tmp_path / "broken", *given, "--count", "3", "--steps", "2", "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert len(list(Path(told["folder"]).glob("*.png"))) >= 3


def recipe_file(root: Path, data: Path, *lines: str) -> Path:
    """A recipe for a folder of data, with more lines of its section `data`."""
    root.mkdir(exist_ok=True)
    path = root / "recipe.yaml"
    section = "".join(f"  {line}\n" for line in (f"path: {data}", "resolution: 8", *lines))
    path.write_text(f"name: x\ndata:\n{section}training:\n  steps: 2\n  batch_size: 4\nnetwork:\n  channels: 8\n")
    return path


def test_mistakes_about_data_end_in_one_sentence_before_anything_is_written(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    texts = metadata(tmp_path / "texts")

    def told(data: Path, *lines: str, words: tuple[str, ...] = ()) -> str:
        return refused("train", recipe_file(tmp_path / "recipes", data, *lines), "--out", run, *words)

    misspelt = told(texts, "caption_column: txet")
    assert "metadata.jsonl" in misspelt
    assert "did you mean 'text'" in misspelt
    looked = told(folder(tmp_path / "plain", files(COUNT)), "caption_column: text")
    for word in ("metadata.jsonl", "metadata.csv", "root", "sub-folder"):
        assert word in looked
    (texts / "003.png").rename(texts / "three.png")
    unmatched = told(texts)
    assert "names without an image: 1 (003.png)" in unmatched
    assert "images without a row or text: 1 of 12 (three.png)" in unmatched
    whole = folder(tmp_path / "whole", files(COUNT))
    assert "nearest are" in told(whole, words=("--resolution", "9"))
    for rate in ("0", "-1e-4"):
        assert "training.learning_rate" in told(whole, words=("--learning_rate", rate))
    assert not run.exists()


def test_too_many_unreadable_pictures_are_named_when_they_are_met(tmp_path: Path, refused: Callable[..., str]) -> None:
    damaged = folder(tmp_path / "damaged", {**files(COUNT), "bad.png": b"hello"})
    sentence = refused("train", recipe_file(tmp_path / "recipes", damaged), "--out", tmp_path / "run")
    assert "bad.png" in sentence
    assert "limit of 1.00%" in sentence
