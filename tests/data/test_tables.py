"""Parquet and saved data sets: columns are found by what they are, splits as Hugging Face finds them."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carrara.data import Batches, Preprocess, Source, open_source, tables
from tests.data.builders import folder, picture, pixels, png
from tests.errors import refused


def data_set(count: int = 6, first: int = 0) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"]), text=datasets.Value("string")
    )
    numbers = range(first, first + count)
    columns = {
        "image": [{"bytes": png(i), "path": None} for i in numbers],
        "label": [i % 2 for i in numbers],
        "text": [f"no {i}" for i in numbers],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def written(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def check(source: Source, numbers: list[int]) -> None:
    assert len(source) == len(numbers)
    for index, number in enumerate(numbers):
        example = source[index]
        assert np.array_equal(np.asarray(example.image), pixels(number))
        assert (example.label, example.caption) == (number % 2, f"no {number}")
    assert source.class_names == ("even", "odd")


def test_one_parquet_file(tmp_path: Path) -> None:
    data_set().to_parquet(str(tmp_path / "a.parquet"))
    source = open_source(tmp_path / "a.parquet")
    check(source, list(range(6)))
    for word in ("a parquet file", "6 rows", "images in 'image'", "2 classes in 'label'", "captions in 'text'"):
        assert word in source.layout


def test_a_folder_of_parquet_in_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in range(2):
        data_set(3, 3 * part).to_parquet(str(tmp_path / "data" / f"train-0000{part}-of-00002.parquet"))
    data_set(2, 10).to_parquet(str(tmp_path / "data" / "validation-00000-of-00001.parquet"))
    check(open_source(tmp_path), list(range(6)))
    check(open_source(tmp_path, split="val"), [10, 11])
    with refused("unknown", key="data.split"):
        open_source(tmp_path, split="test")


def test_splits_of_the_readme(tmp_path: Path) -> None:
    data_set(3).to_parquet(str(tmp_path / "first.parquet"))
    data_set(2, 10).to_parquet(str(tmp_path / "second.parquet"))
    front = "configs:\n- config_name: default\n  data_files:\n"
    front += "  - split: train\n    path: first.parquet\n  - split: test\n    path: second.parquet\n"
    folder(tmp_path, {"README.md": f"---\n{front}---\n# mine\n"})
    check(open_source(tmp_path, split="test"), [10, 11])


def test_saved_data_sets(tmp_path: Path) -> None:
    data_set().save_to_disk(str(tmp_path / "one"))
    check(open_source(tmp_path / "one"), list(range(6)))
    both = datasets.DatasetDict(train=data_set(), test=data_set(2, 10))
    both.save_to_disk(str(tmp_path / "both"))
    check(open_source(tmp_path / "both", split="test"), [10, 11])
    with refused("unknown", key="data.split"):
        open_source(tmp_path / "both", split="validation")


def test_a_saved_selection_keeps_its_rows(tmp_path: Path) -> None:
    data_set().select([4, 1, 3]).save_to_disk(str(tmp_path / "s"))
    check(open_source(tmp_path / "s"), [4, 1, 3])


def test_a_table_larger_than_memory_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_set().to_parquet(str(tmp_path / "a.parquet"))
    monkeypatch.setattr(tables, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = open_source(tmp_path / "a.parquet")
    check(source, list(range(6)))
    assert str(tmp_path / "cache") in source.warnings[0]


def test_opening_writes_nothing_next_to_the_data(tmp_path: Path) -> None:
    data_set().to_parquet(str(tmp_path / "a.parquet"))
    before = sorted(tmp_path.rglob("*"))
    open_source(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_columns_of_other_names_are_found_by_type(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.parquet",
        id=["x", "y"],
        jpg=[png(0), png(1)],
        category=["dog", "cat"],
        headline=["no 0", "no 1"],
    )
    source = open_source(path)
    assert source.class_names == ("cat", "dog")
    assert [(source[i].label, source[i].caption) for i in range(2)] == [(1, "no 0"), (0, "no 1")]


def test_several_texts_are_no_caption_unless_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", image=[png(0)], short=["a"], long=["b"])
    assert not open_source(path).has_captions
    assert open_source(path, caption_column="long")[0].caption == "b"
    with refused("missing", key="data.caption_column"):
        open_source(path, caption_column="shrt")


def test_of_several_captions_the_first_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", image=[png(0), png(1)], captions=[["a", "b"], None])
    source = open_source(path)
    assert source.captions is not None
    assert source.captions[:] == ["a", ""]


def test_integers_are_the_class_numbers_themselves(tmp_path: Path) -> None:
    source = open_source(written(tmp_path / "a.parquet", image=[png(i) for i in range(3)], label=[2, 0, 2]))
    assert source.class_names == ("0", "1", "2")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 2]


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    with refused("missing", key=str(tmp_path / "a.parquet")):
        open_source(written(tmp_path / "a.parquet", a=[1], b=["x"]))


def test_empty_cells_are_named(tmp_path: Path) -> None:
    source = open_source(written(tmp_path / "a.parquet", image=[png(0), None]))
    with refused("damaged", key="a.parquet row 1"):
        source[1]


def test_a_label_beyond_the_declared_classes(tmp_path: Path) -> None:
    table = data_set().data.table
    label = table.column_names.index("label")
    table = table.set_column(label, table.schema.field("label"), pa.array([7] * 6, pa.int64()))
    pq.write_table(table, tmp_path / "a.parquet")
    with refused("mismatch"):
        open_source(tmp_path / "a.parquet")


def test_an_empty_table(tmp_path: Path) -> None:
    with refused("missing", key=str(tmp_path / "a.parquet")):
        open_source(written(tmp_path / "a.parquet", image=pa.array([], pa.binary())))


def test_pictures_by_path_lie_next_to_the_table(tmp_path: Path) -> None:
    picture(3).save(tmp_path / "p.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": None, "path": "p.png"}, {"bytes": None, "path": "gone.png"}], kind)
    source = open_source(written(tmp_path / "a.parquet", image=cells))
    assert np.array_equal(np.asarray(source[0].image), pixels(3))
    with refused("damaged", key="a.parquet row 1"):
        source[1]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def by_path(*names: str) -> pa.Array:
    return pa.array([{"bytes": None, "path": name} for name in names], STRUCT)


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "converted"])
def test_each_part_reads_its_pictures_from_its_own_folder(
    tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(tables, "_IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "set [v1]"
    for number, part in enumerate(["a", "b", "[c]"]):
        written(root / part / "x.parquet", image=by_path("p.png", "q.png") if part == "b" else by_path("p.png"))
        folder(root / part, {"p.png": png(number), "q.png": png(10 + number)})
    source = open_source(root)
    assert [np.array_equal(np.asarray(e.image), pixels(n)) for e, n in zip(source, [2, 0, 1, 11], strict=True)] == [
        True
    ] * 4


def test_a_part_without_rows_shifts_no_folder(tmp_path: Path) -> None:
    written(tmp_path / "a" / "x.parquet", image=pa.array([], STRUCT))
    written(tmp_path / "b" / "x.parquet", image=by_path("p.png"))
    folder(tmp_path, {"a/p.png": png(1), "b/p.png": png(2)})
    assert np.array_equal(np.asarray(open_source(tmp_path)[0].image), pixels(2))


HARMLESS: dict[str, dict[str, object]] = {
    "order of columns": {"text": ["b"], "label": [1], "image": [png(1)]},
    "width of numbers": {"image": [png(1)], "label": pa.array([1], pa.int8()), "text": ["b"]},
    "a column of nulls": {"image": [png(1)], "label": [1], "text": pa.array([None], pa.null())},
    "long texts": {"image": [png(1)], "label": [1], "text": pa.array(["b"], pa.large_string())},
    "a dictionary": {"image": [png(1)], "label": [1], "text": pa.array(["b"]).dictionary_encode()},
    "views": {"image": pa.array([png(1)], pa.binary_view()), "label": [1], "text": pa.array(["b"], pa.string_view())},
}


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "converted"])
@pytest.mark.parametrize("difference", HARMLESS)
def test_harmless_differences_of_schemas(
    tmp_path: Path, difference: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(tables, "_IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written(tmp_path / "set" / "0.parquet", image=[png(0)], label=[0], text=["a"])
    written(tmp_path / "set" / "1.parquet", **HARMLESS[difference])
    source = open_source(tmp_path / "set")
    texts = ["a", "" if difference == "a column of nulls" else "b"]
    assert [(e.label, e.caption) for e in source] == [(0, texts[0]), (1, texts[1])]
    assert [np.array_equal(np.asarray(e.image), pixels(i)) for i, e in enumerate(source)] == [True, True]


def test_declared_classes_outlive_another_width(tmp_path: Path) -> None:
    data_set(2).to_parquet(str(tmp_path / "0.parquet"))
    table = data_set(2, 2).data.table
    label = table.column_names.index("label")
    pq.write_table(table.set_column(label, "label", table.column(label).cast(pa.int32())), tmp_path / "1.parquet")
    check(open_source(tmp_path), [0, 1, 2, 3])


@pytest.mark.parametrize(
    "columns",
    [{"image": [png(1)]}, {"image": [png(1)], "label": ["1"]}, {"image": [png(1)], "label": [[1]]}],
    ids=["lacking", "text", "list"],
)
def test_parts_that_differ_in_their_classes_are_refused(tmp_path: Path, columns: dict[str, object]) -> None:
    written(tmp_path / "0.parquet", image=[png(0)], label=[0])
    written(tmp_path / "1.parquet", **columns)
    with refused("mismatch", key=str(tmp_path / "1.parquet")):
        open_source(tmp_path)


@pytest.mark.parametrize("other", [{}, {"url": [7]}], ids=["lacking", "number"])
def test_other_columns_that_differ_are_left_out(tmp_path: Path, other: dict[str, object]) -> None:
    written(tmp_path / "0.parquet", image=[png(0)], url=["x"])
    written(tmp_path / "1.parquet", image=[png(1)], **other)
    source = open_source(tmp_path)
    assert len(source) == 2
    assert "'url'" in source.warnings[0]


@pytest.mark.parametrize("names", ["0.parquet 1.parquet", "train.parquet test.parquet"])
def test_class_names_in_two_orders_are_refused(tmp_path: Path, names: str) -> None:
    first, second = (tmp_path / name for name in names.split())
    data_set(2).to_parquet(str(first))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["odd", "even"]))
    rows = {"image": [{"bytes": png(1), "path": None}], "label": [0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(second))
    with refused("mismatch", key=str(second)):
        open_source(tmp_path)


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table([pa.array([png(0)]), pa.array([0]), pa.array([1])], names=["image", "label", "label"]), path
    )
    with refused("conflict", key=str(path)):
        open_source(path)


@pytest.mark.parametrize("damage", ["---\nconfigs: [\n---\n", "---\nconfigs: 3\n---\n"])
def test_a_readme_with_a_broken_header(tmp_path: Path, damage: str) -> None:
    written(tmp_path / "a.parquet", image=[png(0)])
    folder(tmp_path, {"README.md": damage})
    with refused("damaged", key=f"{tmp_path}/README.md"):
        open_source(tmp_path)


LABELS_OF_TYPES = {
    "dictionary": (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
    "dictionary of numbers": (pa.array([2, 0, 2]).dictionary_encode(), ("0", "1", "2"), [2, 0, 2]),
    "bool": (pa.array([True, False, True]), ("false", "true"), [1, 0, 1]),
    "float": (pa.array([1.0, 0.0, 1.0]), ("0", "1"), [1, 0, 1]),
    "half": (pa.array(np.array([1, 0, 1], np.float16)), ("0", "1"), [1, 0, 1]),
    "view": (pa.array(["b", "a", "b"], pa.string_view()), ("a", "b"), [1, 0, 1]),
}


@pytest.mark.parametrize("kind", LABELS_OF_TYPES)
@pytest.mark.parametrize("column", ["label", "Label"])
def test_classes_of_every_type_are_read(tmp_path: Path, kind: str, column: str) -> None:
    cells, names, numbers = LABELS_OF_TYPES[kind]
    source = open_source(written(tmp_path / "a.parquet", image=[png(i) for i in range(3)], **{column: cells}))
    assert source.labels is not None
    assert (source.class_names, source.labels.tolist()) == (names, numbers)


@pytest.mark.parametrize(
    "cells",
    [
        pa.array(["a", None]).dictionary_encode(),
        pa.array(["a", None], pa.string_view()),
        pa.array([["a", "b"], []], pa.list_(pa.string_view())),
        pa.array([["a"], None], pa.list_(pa.string(), -1)),
    ],
    ids=["dictionary", "view", "list of views", "list"],
)
def test_captions_of_every_type_are_read(tmp_path: Path, cells: pa.Array) -> None:
    source = open_source(written(tmp_path / "a.parquet", image=[png(0), png(1)], text=cells))
    assert source.captions is not None
    assert source.captions[:] == ["a", ""]


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("label", pa.array([[1, 2], [3]])),
        ("label", pa.array([None, None], pa.null())),
        ("text", pa.array([1, 2])),
        ("caption", pa.array([[{"a": 1}], []])),
    ],
)
def test_columns_that_are_not_read_are_named(tmp_path: Path, column: str, cells: pa.Array) -> None:
    source = open_source(written(tmp_path / "a.parquet", image=[png(0), png(1)], **{column: cells}))
    assert (source.class_names, source.captions) == (None, None)
    assert len(source.warnings) == 1
    assert f"column '{column}'" in source.warnings[0]


def test_captions_that_are_no_text_are_refused(tmp_path: Path) -> None:
    ends = pa.array([0, 1], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"\xe9")])
    path = written(tmp_path / "a.parquet", image=[png(0)], text=broken)
    with refused("damaged"):
        open_source(path)


@pytest.mark.parametrize("first", [b"\x00\x01", b"", None])
@pytest.mark.parametrize("name", ["features", "image"])
def test_the_column_that_holds_pictures_is_taken(tmp_path: Path, first: bytes | None, name: str) -> None:
    path = written(tmp_path / "a.parquet", **{name: pa.array([first] * 2, pa.binary())}, photo=[None, png(1)])
    source = open_source(path)
    assert "images in 'photo'" in source.layout
    assert np.array_equal(np.asarray(source[1].image), pixels(1))


def test_of_several_columns_of_pictures_one_is_taken_and_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", mask=[png(0)], image=[png(1)])
    assert open_source(path).warnings == [f"{path} has 2 columns of images (mask, image): 'image' is taken."]


def test_files_of_several_schemas_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "train-0.parquet", image=[png(0)], label=[1])
    written(tmp_path / "train-1.parquet", picture=[png(0)])
    with refused("mismatch", key=str(tmp_path / "train-1.parquet")):
        open_source(tmp_path)


def test_the_same_batches_from_a_table_as_from_memory(tmp_path: Path) -> None:
    file = io.BytesIO()
    pq.write_table(data_set(12).data.table, file, row_group_size=5)
    (tmp_path / "a.parquet").write_bytes(file.getvalue())
    source = open_source(tmp_path / "a.parquet")
    batch = Batches(source, Preprocess(12, 12), batch_size=6).at(1)
    assert batch.label is not None
    assert batch.captions is not None
    for image, label, caption in zip(batch.images, batch.label.tolist(), batch.captions, strict=True):
        number = int(caption.removeprefix("no "))
        assert label == number % 2
        assert np.array_equal(((image + 1) * 127.5).round().permute(1, 2, 0).numpy(), pixels(number))


@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "saved data set"])
def test_class_names_are_numbered_alike_in_all_splits(tmp_path: Path, saved: bool) -> None:
    """A split that lacks a class must not shift the others."""
    classes = {"train": ["ant", "bee", "cow"], "test": ["cow", "bee"], "validation": ["dog"]}
    columns = {
        split: {"image": [png(i) for i in range(len(names))], "label": names} for split, names in classes.items()
    }
    if saved:
        parts = {split: datasets.Dataset.from_dict(column) for split, column in columns.items()}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    else:
        for split, column in columns.items():
            written(tmp_path / "set" / f"{split}.parquet", **column)
    expected = {"train": [0, 1, 2], "test": [2, 1], "validation": [3]}
    for split, numbers in expected.items():
        source = open_source(tmp_path / "set", split)
        assert source.class_names == ("ant", "bee", "cow", "dog")
        assert source.labels is not None
        assert source.labels.tolist() == numbers
