"""Each layout is found by looking, and gives the same pictures, labels and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carrara.data import Source, open_source
from tests.data.builders import Contents, files, folder, jsonl, picture, pixels, png, tarred, zipped
from tests.errors import refused

CAPTIONED: Contents = {
    name: data for i in range(4) for name, data in ((f"{i}.png", png(i)), (f"{i}.txt", f"picture {i}\n"))
}
CLASSES: Contents = {f"{name}/{i}.png": png(i) for i, name in enumerate(["cat", "dog", "cat", "emu"])}
DESCRIBED: Contents = {
    **{f"images/{i}.png": png(i) for i in range(3)},
    "metadata.jsonl": jsonl(*({"file_name": f"images/{i}.png", "text": f"picture {i}"} for i in range(3))),
}


def same_pixels(source: Source, index: int, number: int) -> bool:
    return np.array_equal(np.asarray(source[index].image), pixels(number))


@pytest.mark.parametrize("archive", ["folder", "zip"])
def test_plain_images(tmp_path: Path, archive: str) -> None:
    contents: Contents = {**files(5), "notes.md": "# mine"}
    path = folder(tmp_path / "a", contents) if archive == "folder" else zipped(tmp_path / "a.zip", contents)
    source = open_source(path)
    assert len(source) == 5
    assert all(same_pixels(source, i, i) for i in range(5))
    assert (source.class_names, source.has_captions, source.levels) == (None, False, 256)
    assert source[2].name.endswith("002.png")
    assert "5 images" in source.layout
    assert source.warnings == []


@pytest.mark.parametrize("archive", ["folder", "zip"])
def test_class_folders(tmp_path: Path, archive: str) -> None:
    path = folder(tmp_path / "a", CLASSES) if archive == "folder" else zipped(tmp_path / "a.zip", CLASSES)
    source = open_source(path)
    assert source.class_names == ("cat", "dog", "emu")
    assert [source[i].label for i in range(4)] == [0, 0, 1, 2]
    assert [same_pixels(source, i, number) for i, number in enumerate([0, 2, 1, 3])] == [True] * 4
    assert "class folders, 3 classes" in source.layout


def test_nested_class_folders_take_the_first_folder(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {"cat/old/1.png": png(1), "cat/2.png": png(2), "dog/x/y/3.png": png(3)}))
    assert source.class_names == ("cat", "dog")


def test_images_outside_of_class_folders_are_named(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {**CLASSES, "stray.png": png(9)}))
    assert source.class_names is None
    assert source.warnings == ["1 image outside of the sub-folders: these are not taken for classes."]


@pytest.mark.parametrize("archive", ["folder", "zip"])
def test_text_files_next_to_images(tmp_path: Path, archive: str) -> None:
    path = folder(tmp_path / "a", CAPTIONED) if archive == "folder" else zipped(tmp_path / "a.zip", CAPTIONED)
    source = open_source(path)
    assert source.captions is not None
    assert source.captions[:] == [f"picture {i}" for i in range(4)]
    assert source[3].caption == "picture 3"
    assert same_pixels(source, 3, 3)


@pytest.mark.parametrize("archive", ["folder", "zip"])
def test_metadata_jsonl(tmp_path: Path, archive: str) -> None:
    path = folder(tmp_path / "a", DESCRIBED) if archive == "folder" else zipped(tmp_path / "a.zip", DESCRIBED)
    source = open_source(path)
    assert [source[i].caption for i in range(3)] == ["picture 0", "picture 1", "picture 2"]
    assert "metadata.jsonl (captions in 'text')" in source.layout


def test_metadata_csv_with_labels(tmp_path: Path) -> None:
    table = "file_name,text,label\n0.png,zero,even\n1.png,one,odd\n2.png,two,even\n"
    source = open_source(folder(tmp_path, {**files(3, "{}.png"), "metadata.csv": table}))
    assert source.class_names == ("even", "odd")
    assert [(source[i].caption, source[i].label) for i in range(3)] == [("zero", 0), ("one", 1), ("two", 0)]


def test_metadata_in_sub_folders_is_about_its_own_folder(tmp_path: Path) -> None:
    contents: Contents = {
        "a/x.png": png(1),
        "a/metadata.jsonl": jsonl({"file_name": "x.png", "text": "first"}),
        "b/x.png": png(2),
        "b/metadata.csv": "file_name,text\nx.png,second\n",
    }
    source = open_source(folder(tmp_path, contents))
    assert [(source[i].name, source[i].caption) for i in range(2)] == [("a/x.png", "first"), ("b/x.png", "second")]


@pytest.mark.parametrize("column", ["caption", "prompt", "description", "meaning"])
def test_a_caption_column_of_another_name(tmp_path: Path, column: str) -> None:
    rows = jsonl({"file_name": "000.png", column: "hello", "width": 3})
    assert open_source(folder(tmp_path, {**files(1), "metadata.jsonl": rows}))[0].caption == "hello"


def test_the_named_caption_column_wins(tmp_path: Path) -> None:
    rows = jsonl({"file_name": "000.png", "text": "long", "short": "brief"})
    path = folder(tmp_path, {**files(1), "metadata.jsonl": rows})
    assert open_source(path)[0].caption == "long"
    assert open_source(path, caption_column="short")[0].caption == "brief"


def test_shards(tmp_path: Path) -> None:
    for shard in range(3):
        keys = range(shard * 4, shard * 4 + 4)
        contents: Contents = {
            f"{k:05d}.{end}": data for k in keys for end, data in (("png", png(k)), ("txt", f"no {k}"))
        }
        contents |= {f"{k:05d}.cls": str(k % 2) for k in keys}
        tarred(tmp_path / f"{shard:05d}.tar", contents)
    source = open_source(tmp_path)
    assert len(source) == 12
    assert all(same_pixels(source, k, k) for k in range(12))
    assert [source[k].caption for k in (0, 11)] == ["no 0", "no 11"]
    assert source.class_names == ("0", "1")
    assert source[7].label == 1
    assert source[7].name == "00001.tar/00007.png"
    braces = open_source(str(tmp_path / "{00001..00002}.tar"))
    assert len(braces) == 8
    assert len(open_source(tmp_path / "00001.tar")) == 4


def test_shards_with_json(tmp_path: Path) -> None:
    contents: Contents = {
        f"{k}.{end}": d for k in range(3) for end, d in (("png", png(k)), ("json", f'{{"caption": "c{k}"}}'))
    }
    assert open_source(tarred(tmp_path / "0.tar", contents))[2].caption == "c2"


def test_shards_of_splits(tmp_path: Path) -> None:
    tarred(tmp_path / "train-000.tar", files(3))
    tarred(tmp_path / "val-000.tar", files(2))
    assert len(open_source(tmp_path)) == 3
    assert len(open_source(tmp_path, split="validation")) == 2


def test_a_gap_in_the_shard_numbers_is_named(tmp_path: Path) -> None:
    for shard in (0, 1, 4):
        tarred(tmp_path / f"part-{shard:03d}.tar", {f"{shard}.png": png(shard)})
    assert open_source(tmp_path).warnings == ["shards missing from the running numbers: 2, the first is part-002.tar."]


def test_split_folders(tmp_path: Path) -> None:
    contents: Contents = {f"{split}/{c}/{i}.png": png(i) for split in ("train", "val") for c in "ab" for i in range(2)}
    path = folder(tmp_path, contents)
    assert open_source(path).class_names == ("a", "b")
    assert len(open_source(path, split="validation")) == 4
    with refused("unknown", key="data.split"):
        open_source(path, split="tset")


def test_classes_are_numbered_alike_in_all_splits(tmp_path: Path) -> None:
    contents = {f"train/{c}/1.png": png(1) for c in "abc"} | {f"test/{c}/1.png": png(2) for c in "bd"}
    test = open_source(folder(tmp_path / "folders", contents), split="test")
    assert test.class_names == ("a", "b", "c", "d")
    assert [test[i].label for i in range(2)] == [1, 3]
    rows = {
        split: jsonl(*({"file_name": f"{i}.png", "label": c} for i, c in enumerate(classes)))
        for split, classes in (("train", "abc"), ("test", "bd"))
    }
    described: Contents = {f"{split}/metadata.jsonl": table for split, table in rows.items()}
    described |= {f"train/{i}.png": png(i) for i in range(3)} | {f"test/{i}.png": png(i) for i in range(2)}
    test = open_source(folder(tmp_path / "rows", described), split="test")
    assert test.class_names == ("a", "b", "c", "d")
    assert [test[i].label for i in range(2)] == [1, 3]


def test_one_metadata_file_for_all_splits(tmp_path: Path) -> None:
    names = ["train/0.png", "train/1.png", "test/0.png"]
    contents: Contents = {name: png(i) for i, name in enumerate(names)}
    contents["metadata.csv"] = "file_name,text\n" + "".join(f"{name},about {name}\n" for name in names)
    source = open_source(folder(tmp_path, contents), split="test")
    assert [(e.name, e.caption) for e in source] == [("test/0.png", "about test/0.png")]
    assert source.warnings == []


def test_lone_folders_are_descended_into(tmp_path: Path) -> None:
    deep = {f"my photos/{name}": data for name, data in CLASSES.items()}
    assert open_source(zipped(tmp_path / "a.zip", deep)).class_names == ("cat", "dog", "emu")
    splits = {f"root/{split}/images/{c}/{i}.png": png(i) for split in ("train", "val") for c in "ab" for i in range(2)}
    source = open_source(zipped(tmp_path / "b.zip", splits), split="val")
    assert (source.class_names, len(source)) == (("a", "b"), 4)
    assert "in root/val/images/" in source.layout


def test_a_plain_tar_of_class_folders(tmp_path: Path) -> None:
    assert open_source(tarred(tmp_path / "photos.tar", CLASSES)).class_names == ("cat", "dog", "emu")


def test_a_file_is_the_split_it_names(tmp_path: Path) -> None:
    tarred(tmp_path / "dev" / "test-0.tar", files(2))
    assert len(open_source(tmp_path / "dev" / "test-0.tar")) == 2
    assert len(open_source(str(tmp_path / "dev" / "test-{0..0}.tar"), split="test")) == 2
    with refused("unknown", key="data.split"):
        open_source(tmp_path / "dev" / "test-0.tar", split="validation")


def test_files_that_pillow_does_not_read_are_counted(tmp_path: Path) -> None:
    contents: Contents = {**files(2), "a.HEIC": b"x", "b.heic": b"x", "c.cr2": b"x"}
    assert open_source(folder(tmp_path, contents)).warnings == [
        "not read: 2 .heic files; convert to .png or .jpg.",
        "not read: 1 .cr2 file; convert to .png or .jpg.",
    ]


def test_metadata_parquet_next_to_images(tmp_path: Path) -> None:
    path = folder(tmp_path, files(2))
    pq.write_table(pa.table({"file_name": ["000.png", "001.png"], "text": ["a", "b"]}), path / "metadata.parquet")
    assert [example.caption for example in open_source(path)] == ["a", "b"]


def test_a_damaged_member_of_a_zip_is_unreadable(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", files(3))
    data = bytearray(path.read_bytes())
    data[data.index(png(1)) + 60] ^= 0xFF
    path.write_bytes(bytes(data))
    source = open_source(path)
    with refused("damaged", key="a.zip/001.png"):
        source[1]
    assert same_pixels(source, 2, 2)


def test_a_class_called_test_is_no_split(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {"test/1.png": png(1), "exam/2.png": png(2)}))
    assert source.class_names == ("exam", "test")


def test_digits() -> None:
    train, test = open_source("digits"), open_source("digits", split="test")
    assert (len(train), len(test), train.levels) == (1437, 360, 17)
    assert train.class_names == tuple("0123456789")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    expected, _, numbers, _ = train_test_split(scans, labels, test_size=360, random_state=0, stratify=labels)
    assert np.array_equal(np.stack([np.asarray(train[i].image).ravel() for i in range(1437)]), expected)
    assert train.labels is not None
    assert np.array_equal(train.labels, numbers)
    with refused("unknown", key="data.split"):
        open_source("digits", split="validation")


def test_hidden_and_system_files_are_left_out(tmp_path: Path) -> None:
    contents: Contents = {
        **files(2),
        ".hidden.png": png(5),
        ".git/x.png": png(6),
        "__MACOSX/._000.png": b"resource fork",
    }
    assert len(open_source(folder(tmp_path / "f", contents))) == 2
    assert len(open_source(zipped(tmp_path / "z.zip", contents))) == 2


def test_the_order_of_files_does_not_depend_on_the_disk(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        folder(tmp_path, {f"{name}.png": png(ord(name))})
    source = open_source(tmp_path)
    assert [source[i].name for i in range(3)] == ["a.png", "b.png", "c.png"]


def test_mixed_endings_and_cases(tmp_path: Path) -> None:
    names = {"a.PNG": "png", "b.Jpg": "jpeg", "c.webp": "webp", "d.bmp": "bmp", "e.tiff": "tiff", "f.gif": "gif"}
    for name, kind in names.items():
        picture(1).save(tmp_path / name, kind)
    source = open_source(tmp_path)
    assert [source[i].image.size for i in range(len(source))] == [(12, 12)] * 6


@pytest.mark.parametrize("labels", [[["a/0.png", 6], ["a/1.png", 2]], None])
def test_the_zip_of_edm(tmp_path: Path, labels: list[list[object]] | None) -> None:
    contents: Contents = {"a/0.png": png(0), "a/1.png": png(1), "dataset.json": json.dumps({"labels": labels})}
    source = open_source(zipped(tmp_path / "a.zip", contents))
    assert len(source) == 2
    assert source.class_names == (None if labels is None else tuple("0123456"))
    assert source[0].label == (None if labels is None else 6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_as_adm_writes_them(tmp_path: Path, channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", array, np.array([3, 1, 3, 1, 3]))
    source = open_source(tmp_path / "a.npz")
    assert np.array_equal(np.stack([np.asarray(source[i].image) for i in range(5)]).reshape(array.shape), array)
    assert source.class_names == ("0", "1", "2", "3")
    assert source[0].label == 3


@pytest.mark.parametrize(
    "array", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 2), np.uint8)]
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    np.savez(tmp_path / "a.npz", array)
    with refused("shape", key=str(tmp_path / "a.npz")):
        open_source(tmp_path / "a.npz")


@pytest.mark.parametrize("labels", [None, np.zeros(0, np.int64)])
def test_an_npz_of_no_images_is_refused(tmp_path: Path, labels: np.ndarray[Any, Any] | None) -> None:
    arrays = {"arr_0": np.zeros((0, 8, 8, 3), np.uint8)} | ({} if labels is None else {"arr_1": labels})
    np.savez(tmp_path / "a.npz", **arrays)
    with refused("missing", key=str(tmp_path / "a.npz")):
        open_source(tmp_path / "a.npz")


def test_class_words_in_file_names_are_pointed_out(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "a", {f"{c}_{i}.png": png(i) for c in ("cat", "dog") for i in range(3)}))
    assert source.class_names is None
    assert source.warnings == ["file names begin with 2 words (cat, dog, …): for classes, sort them into sub-folders."]
    assert open_source(folder(tmp_path / "b", {f"IMG_{i}.png": png(i) for i in range(3)})).warnings == []


def test_links_do_not_lead_in_circles(tmp_path: Path) -> None:
    folder(tmp_path / "set", {"a/1.png": png(1), "b/2.png": png(2)})
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "set" / "a")
    source = open_source(tmp_path / "set")
    assert [source[i].name for i in range(len(source))] == ["a/1.png", "b/2.png", "c/1.png"]


@pytest.mark.parametrize("shard", ["backup.tar", "more/000.tar"])
def test_images_and_shards_in_one_folder_are_refused(tmp_path: Path, shard: str) -> None:
    tarred(folder(tmp_path, files(3)) / shard, files(2))
    with refused("conflict", key=str(tmp_path)):
        open_source(tmp_path)


@pytest.mark.parametrize("contents", [{"notes.md": "# mine"}, {"weights.bin": b"12"}])
def test_a_tar_without_images_takes_no_folder_over(tmp_path: Path, contents: Contents) -> None:
    tarred(folder(tmp_path, files(3)) / "other.tar", contents)
    source = open_source(tmp_path)
    assert len(source) == 3
    assert source.warnings == ["not read: 1 .tar file; give its path to read it."]


def test_a_damaged_tar_takes_no_folder_over(tmp_path: Path) -> None:
    assert len(open_source(folder(tmp_path, {**files(3), "a.tar": b"junk"}))) == 3


@pytest.mark.parametrize("columns", [{"a": [1]}, {"embedding": [[0.5, 1.5]]}])
def test_a_table_without_images_takes_no_folder_over(tmp_path: Path, columns: dict[str, object]) -> None:
    pq.write_table(pa.table(columns), folder(tmp_path, files(3)) / "features.parquet")
    source = open_source(tmp_path)
    assert len(source) == 3
    assert source.warnings == ["not read: 1 .parquet file; give its path to read it."]


def test_images_next_to_a_table_of_images_are_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(7)]}), folder(tmp_path, {"assets/a.png": png(0)}) / "a.parquet")
    source = open_source(tmp_path)
    assert same_pixels(source, 0, 7)
    assert source.warnings == ["not read, as the parquet holds the images: 1 image file."]


def test_shards_and_tables_in_one_folder_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(7)]}), tmp_path / "a.parquet")
    tarred(tmp_path / "a.tar", files(2))
    with refused("conflict", key=str(tmp_path)):
        open_source(tmp_path)


def test_a_state_of_something_else_is_no_saved_data_set(tmp_path: Path) -> None:
    assert len(open_source(folder(tmp_path, {**files(2), "state.json": "{}"}))) == 2


@pytest.mark.parametrize("others", [["plane"], ["car", "plane"], ["unsorted/deep"]])
@pytest.mark.parametrize("archive", ["folder", "zip", "tar"])
def test_a_folder_called_train_among_others_is_refused(tmp_path: Path, others: list[str], archive: str) -> None:
    contents: Contents = {f"{name}/{i}.png": png(i) for name in ["train", *others] for i in range(2)}
    path = {"folder": folder, "zip": zipped, "tar": tarred}[archive](tmp_path / f"a.{archive}", contents)
    with refused("conflict", key=str(path)):
        open_source(path)


@pytest.mark.parametrize("stray", ["stray.png", "extra/1.png"])
def test_images_of_no_split_are_counted(tmp_path: Path, stray: str) -> None:
    contents: Contents = {f"{split}/{i}.png": png(i) for split in ("train", "test") for i in range(2)}
    source = open_source(folder(tmp_path, {**contents, stray: png(5)}))
    assert len(source) == 2
    assert source.warnings == [f"images of no split, left out: 1 (the first is {stray})."]


def test_two_spellings_of_one_split_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, {f"{split}/1.png": png(1) for split in ("train", "val", "valid")})
    assert len(open_source(path, split="val")) == 1
    with refused("conflict", key="data.split"):
        open_source(path, split="validation")


def test_a_plain_tar_has_its_own_splits(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", {f"{split}/{i}.png": png(i) for split in ("train", "test") for i in range(2)})
    assert [example.name for example in open_source(path, split="test")] == ["a.tar/test/0.png", "a.tar/test/1.png"]
