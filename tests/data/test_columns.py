"""Classes by one rule for all sources: what is none is refused, and its first row is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carrara.data import open_source
from carrara.data.columns import class_numbers, numbers_or_names
from carrara.errors import UserError
from tests.data.builders import Contents, files, folder, jsonl, png, tarred
from tests.errors import refused

NAN = float("nan")


def in_parquet(root: Path, labels: list[object]) -> Path:
    pq.write_table(pa.table({"image": [png(i) for i in range(len(labels))], "label": labels}), root / "a.parquet")
    return root / "a.parquet"


def in_json_lines(root: Path, labels: list[object]) -> Path:
    rows = [{"file_name": f"{i:03d}.png", "label": label} for i, label in enumerate(labels)]
    return folder(root, {**files(len(labels)), "metadata.jsonl": jsonl(*rows)})


def in_csv(root: Path, labels: list[object]) -> Path:
    cells = ["" if label is None else str(label) for label in labels]
    rows = "".join(f"{i:03d}.png,{cell}\n" for i, cell in enumerate(cells))
    return folder(root, {**files(len(labels)), "metadata.csv": "file_name,label\n" + rows})


def in_shard_json(root: Path, labels: list[object]) -> Path:
    contents: Contents = dict(files(len(labels)))
    contents |= {f"{i:03d}.json": json.dumps({"label": label}) for i, label in enumerate(labels)}
    return tarred(root / "a.tar", contents)


def in_edm(root: Path, labels: list[object]) -> Path:
    pairs = [[f"{i:03d}.png", label] for i, label in enumerate(labels)]
    return folder(root, {**files(len(labels)), "dataset.json": json.dumps({"labels": pairs})})


def in_npz(root: Path, labels: list[object]) -> Path:
    np.savez(root / "a.npz", np.zeros((len(labels), 4, 4, 3), np.uint8), np.array(labels))
    return root / "a.npz"


SOURCES: list[Callable[[Path, list[object]], Path]] = [
    in_parquet, in_json_lines, in_csv, in_shard_json, in_edm, in_npz
]  # fmt: skip


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([2, 0, 2], [2, 0, 2], ("0", "1", "2")),
        (["emu", "cat", "emu"], [1, 0, 1], ("cat", "emu")),
        ([100000, 99999, 100000], [1, 0, 1], ("99999", "100000")),
    ],
)
def test_every_source_numbers_classes_alike(
    tmp_path: Path,
    write: Callable[[Path, list[object]], Path],
    labels: list[object],
    numbers: list[int],
    names: tuple[str, ...],
) -> None:
    source = open_source(write(tmp_path, labels))
    assert source.labels is not None
    assert (source.labels.tolist(), source.class_names) == (numbers, names)


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize("bad", [-1, 1.5, NAN, None])
def test_every_source_refuses_what_is_no_class_and_names_it(
    tmp_path: Path, write: Callable[[Path, list[object]], Path], bad: object
) -> None:
    if write is in_npz and bad is None:
        pytest.skip("an array of numbers has no empty cells")
    path = write(tmp_path, [0, 1, bad, bad])
    with pytest.raises(UserError, match=r"row 2|002\.png") as caught:  # a golden sentence: it names the row
        open_source(path)
    assert caught.value.code == "invalid"


@pytest.mark.parametrize("write", [in_json_lines, in_shard_json, in_edm])
@pytest.mark.parametrize("bad", [[1], {"a": 1}, [], ""])
def test_nested_and_empty_classes_in_json(
    tmp_path: Path, write: Callable[[Path, list[object]], Path], bad: object
) -> None:
    path = write(tmp_path, [0, bad])
    with refused("invalid"):
        open_source(path)


@pytest.mark.parametrize("write", [in_parquet, in_json_lines, in_shard_json, in_csv])
def test_truth_values_are_two_classes(tmp_path: Path, write: Callable[[Path, list[object]], Path]) -> None:
    labels: list[object] = [True, False] if write is not in_csv else ["true", "false"]
    source = open_source(write(tmp_path, labels))
    assert source.class_names == ("false", "true")
    assert [source[0].label, source[1].label] == [1, 0]


@pytest.mark.parametrize("values", [[1, "1"], ["cat", 3], [0, 1, True], [True, "true"]])
def test_kinds_of_classes_are_not_mixed(values: list[object]) -> None:
    with refused("mismatch", key="the data"):
        class_numbers(values)
    with refused("mismatch", key="the data"):
        class_numbers(values[:1], known=values[1:])


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert class_numbers([1.0, 0, 1])[0].tolist() == [1, 0, 1]
    assert numbers_or_names(["1.0", "", "0"]) == [1.0, "", 0]
    assert numbers_or_names(["1", "x", "0"]) == ["1", "x", "0"]
    assert numbers_or_names(["nan", "2"])[1] == 2


@pytest.mark.parametrize("names", [["10", "2", "1"], ["010", "9"], ["12", "3", "cat"]])
def test_names_of_digits_come_by_size(names: list[str]) -> None:
    ordered = class_numbers(names)[1]
    digits = [int(name) for name in ordered if name.isdecimal()]
    assert digits == sorted(digits)
    assert set(ordered) == set(names)


def test_class_folders_of_numbers_come_by_size(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {f"{i}/a.png": png(i) for i in range(12)}))
    assert source.class_names == tuple(map(str, range(12)))


def test_what_is_no_class_in_another_split_disturbs_nobody() -> None:
    assert class_numbers(["a", "c"], known=["b", None, -1])[1] == ("a", "b", "c")


def test_a_class_beyond_the_declared_names() -> None:
    assert class_numbers([1, 0], names=("no", "yes"))[1] == ("no", "yes")
    with refused("mismatch"):
        class_numbers([1, 2], names=("no", "yes"))
