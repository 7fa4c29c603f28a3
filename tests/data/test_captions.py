"""Captions and classes next to pictures: what some files lack is counted, and no source hides another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from carrara.data import open_source
from carrara.data.identity import identity
from tests.data.builders import Contents, files, folder, jsonl, png, tarred, zipped
from tests.errors import refused

Write = Callable[[Path, Contents], Path]


def as_folder(root: Path, contents: Contents) -> Path:
    return folder(root / "set", contents)


def as_zip(root: Path, contents: Contents) -> Path:
    return zipped(root / "a.zip", contents)


def as_shard(root: Path, contents: Contents) -> Path:
    return tarred(root / "a.tar", contents)


def as_shards(root: Path, contents: Contents) -> Path:
    for number in range(2):
        keys = {name: data for name, data in contents.items() if int(name.rsplit("/")[-1][:3]) % 2 == number}
        tarred(root / "set" / f"{number}.tar", keys)
    return root / "set"


TREES: list[Write] = [as_folder, as_zip, as_shard, as_shards]


def side(count: int, suffix: str, text: Callable[[int], str]) -> Contents:
    return {f"{i:03d}{suffix}": text(i) for i in range(count)}


def label(number: int) -> str:
    return json.dumps({"label": number % 2, "caption": f"json {number}"})


@pytest.mark.parametrize("write", TREES)
@pytest.mark.parametrize("suffix", [".json", ".cls", ".txt", ".caption"])
def test_one_missing_side_file_is_counted(tmp_path: Path, write: Write, suffix: str) -> None:
    contents = files(20) | side(20, suffix, label if suffix == ".json" else lambda i: str(i % 2))
    del contents[f"003{suffix}"]
    path = write(tmp_path, contents)
    with refused("mismatch", key="data.unreadable_limit"):
        open_source(path)
    source = open_source(path, unreadable_limit=0.05)
    assert len(source) == 19
    assert "1 of 20" in source.warnings[0]
    assert "003.png" in source.warnings[0]
    assert source.captions is None or "003" not in "".join(example.name for example in source)
    if suffix in (".json", ".cls"):
        assert all(example.label == int(example.name[-7:-4]) % 2 for example in source)


@pytest.mark.parametrize("write", TREES)
def test_captions_in_text_files_and_classes_in_json(tmp_path: Path, write: Write) -> None:
    source = open_source(write(tmp_path, files(4) | side(4, ".txt", str) | side(4, ".json", label)))
    assert sorted((e.label, e.caption) for e in source) == [(0, "0"), (0, "2"), (1, "1"), (1, "3")]


@pytest.mark.parametrize("write", TREES)
def test_captions_in_json_and_classes_in_cls(tmp_path: Path, write: Write) -> None:
    contents = files(4) | side(4, ".json", label) | side(4, ".cls", lambda i: str(3 - i))
    found = sorted((e.caption, e.label) for e in open_source(write(tmp_path, contents)))
    assert found == [(f"json {i}", 3 - i) for i in range(4)]


@pytest.mark.parametrize("write", TREES)
def test_a_requested_column_of_json_wins_over_text_files(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, files(4) | side(4, ".txt", str) | side(4, ".json", label))
    assert sorted(e.caption or "" for e in open_source(path, caption_column="caption"))[0] == "json 0"
    with refused("missing", key="data.caption_column"):
        open_source(path, caption_column="capton")


def test_json_files_of_sizes_and_addresses_disturb_nobody(tmp_path: Path) -> None:
    contents = files(300) | side(300, ".txt", str) | side(250, ".json", lambda i: json.dumps({"width": i}))
    assert open_source(tarred(tmp_path / "a.tar", contents)).warnings == []
    only = files(2) | side(2, ".json", lambda i: json.dumps({"width": i}))
    assert "neither captions nor classes" in open_source(folder(tmp_path / "set", only)).warnings[0]


IN_CLASSES: Contents = {f"{c}/{i:03d}.png": png(i) for i, c in enumerate(["cat", "dog", "cat", "dog"])}


@pytest.mark.parametrize("write", TREES)
@pytest.mark.parametrize("suffix", [".txt", ".json", ".caption"])
def test_class_folders_keep_their_classes_next_to_captions(tmp_path: Path, write: Write, suffix: str) -> None:
    texts = {name.replace(".png", suffix): json.dumps({"text": name}) for name in IN_CLASSES}
    source = open_source(write(tmp_path, {**IN_CLASSES, **texts}))
    assert source.class_names == ("cat", "dog")
    assert all(e.caption and ("dog/" in e.caption) == e.label for e in source)


@pytest.mark.parametrize("write", [as_folder, as_zip])
@pytest.mark.parametrize("table", ["jsonl", "csv"])
def test_class_folders_keep_their_classes_next_to_metadata(tmp_path: Path, write: Write, table: str) -> None:
    rows: Contents = {"metadata.jsonl": jsonl(*({"file_name": name, "text": name} for name in IN_CLASSES))}
    if table == "csv":
        rows = {"metadata.csv": "file_name,text\n" + "".join(f"{name},{name}\n" for name in IN_CLASSES)}
    source = open_source(write(tmp_path, {**IN_CLASSES, **rows}))
    assert source.class_names == ("cat", "dog")
    assert all(e.caption == e.name.removeprefix("a.zip/") for e in source)


def test_classes_of_metadata_with_captions_in_text_files(tmp_path: Path) -> None:
    rows = jsonl(*({"file_name": f"{i:03d}.png", "label": i % 2} for i in range(4)))
    source = open_source(folder(tmp_path, {**files(4), **side(4, ".txt", str), "metadata.jsonl": rows}))
    assert [(e.label, e.caption) for e in source] == [(0, "0"), (1, "1"), (0, "2"), (1, "3")]


def test_text_files_of_another_split_are_no_names_without_an_image(tmp_path: Path) -> None:
    contents = {f"{split}/{name}": data for split in ("train", "test") for name, data in files(2).items()}
    contents |= {name.replace(".png", ".txt"): name for name in contents}
    assert open_source(folder(tmp_path, contents), split="test").captions is not None


NO_CAPTIONS: dict[str, object] = {
    "objects": [{"box": [1, 2]}, {"box": [3, 4]}],
    "bbox": [1, 2, 3, 4],
    "number": 7,
    "truth": True,
    "object": {"a": "b"},
    "mixed list": ["a", 1],
}


@pytest.mark.parametrize("kind", NO_CAPTIONS)
def test_what_is_no_text_is_no_caption(tmp_path: Path, kind: str) -> None:
    value = NO_CAPTIONS[kind]
    rows = jsonl(*({"file_name": f"{i:03d}.png", "label": i, "notes": value} for i in range(2)))
    assert open_source(folder(tmp_path / "a", {**files(2), "metadata.jsonl": rows})).captions is None
    named = jsonl(*({"file_name": f"{i:03d}.png", "label": i, "text": value} for i in range(2)))
    source = open_source(folder(tmp_path / "b", {**files(2), "metadata.jsonl": named}))
    assert source.captions is None
    assert "column 'text'" in source.warnings[0]


@pytest.mark.parametrize("kind", NO_CAPTIONS)
def test_one_value_that_is_no_text_among_captions_is_refused(tmp_path: Path, kind: str) -> None:
    texts = ["a", None, NO_CAPTIONS[kind], "b"]
    rows = jsonl(*({"file_name": f"{i:03d}.png", "text": text} for i, text in enumerate(texts)))
    with refused("invalid", key="metadata.jsonl"):
        open_source(folder(tmp_path, {**files(4), "metadata.jsonl": rows}))


@pytest.mark.parametrize("text", ["cat \\ud83d", "\\ude00", "\\udce9t\\u00e9"])
@pytest.mark.parametrize("write", ["metadata", "side"])
def test_half_characters_in_captions_are_replaced_and_counted(tmp_path: Path, text: str, write: str) -> None:
    contents = files(1)
    if write == "metadata":
        contents["metadata.jsonl"] = f'{{"file_name": "000.png", "text": "{text}"}}\n'
    else:
        contents["000.json"] = f'{{"text": "{text}"}}'
    source = open_source(folder(tmp_path, contents))
    assert source.captions is not None
    assert "\ufffd" in source.captions[0].encode().decode()
    assert "1 of 1" in source.warnings[0]
    assert identity(source)


@pytest.mark.parametrize("table", ["jsonl", "csv"])
def test_two_rows_of_one_picture(tmp_path: Path, table: str) -> None:
    def written(*texts: str) -> Contents:
        if table == "csv":
            return {"metadata.csv": "file_name,text\n" + "".join(f"000.png,{text}\n" for text in texts)}
        return {"metadata.jsonl": jsonl(*({"file_name": "000.png", "text": text} for text in texts))}

    with refused("conflict", key=f"metadata.{table}"):
        open_source(folder(tmp_path / "a", files(1) | written("one", "two")))
    source = open_source(folder(tmp_path / "b", files(1) | written("one", "one")))
    assert source[0].caption == "one"
    assert "rows that repeat another: 1" in source.warnings[0]


def test_rows_of_one_picture_in_two_files(tmp_path: Path) -> None:
    contents: Contents = {
        "a/000.png": png(0),
        "a/metadata.jsonl": jsonl({"file_name": "000.png", "label": 0}),
        "metadata.jsonl": jsonl({"file_name": "a/000.png", "label": 1}),
    }
    with refused("conflict"):
        open_source(folder(tmp_path, contents))


def test_a_second_text_file_of_a_picture_is_named(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {**files(1), "000.txt": "a", "000.caption": "b"}))
    assert source[0].caption == "b"
    assert source.warnings == ["second captions of one image, not read: 000.txt."]
