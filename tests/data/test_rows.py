"""Metadata files that are unusual are read whole, those that are broken are refused by their line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carrara.data import Source, open_source
from tests.data.builders import Contents, files, folder, tarred
from tests.errors import refused


def described(root: Path, name: str, content: str | bytes, count: int = 2) -> Source:
    return open_source(folder(root, {**files(count), name: content}))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_line_ends_of_every_age(tmp_path: Path, end: str, name: str) -> None:
    lines = ["file_name,text", "000.png,zero", "001.png,one"]
    if name.endswith("jsonl"):
        lines = ['{"file_name": "000.png", "text": "zero"}', "", '{"file_name": "001.png", "text": "one"}']
    source = described(tmp_path, name, end.join([*lines, ""]))
    assert [example.caption for example in source] == ["zero", "one"]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "000.txt"])
def test_signs_that_are_line_ends_to_unicode_only_stay_in_captions(tmp_path: Path, sign: str, name: str) -> None:
    text = f"a{sign}b"
    content = {
        "metadata.csv": f"file_name,text\n000.png,{text}\n",
        "metadata.jsonl": json.dumps({"file_name": "000.png", "text": text}, ensure_ascii=sign < " ") + "\n",
        "000.txt": text,
    }[name]
    assert described(tmp_path, name, content, 1)[0].caption == text


@pytest.mark.parametrize("length", [200_000, 1_000_000])
@pytest.mark.parametrize("quote", ["", '"'])
def test_long_captions(tmp_path: Path, length: int, quote: str) -> None:
    text = "x" * length
    assert described(tmp_path, "metadata.csv", f"file_name,text\n000.png,{quote}{text}{quote}\n", 1)[0].caption == text


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("file_name,text\n000.png,a cat, a dog\n", "shape"),
        ("file_name,label\n000.png,1,2\n", "shape"),
        ("file_name,text,text\n000.png,a,b\n", "conflict"),
        ('file_name,text\n000.png,"a cat\n001.png,a dog\n', "damaged"),
        ('file_name,text\n000.png,"a "big" cat"\n', "damaged"),
    ],
    ids=["comma", "cell", "column twice", "open quote", "inner quote"],
)
def test_malformed_csv(tmp_path: Path, content: str, code: str) -> None:
    with refused(code, key="metadata.csv"):  # type: ignore[arg-type]
        described(tmp_path, "metadata.csv", content)


def test_empty_cells_at_the_end_of_a_line_are_no_cells(tmp_path: Path) -> None:
    assert described(tmp_path, "metadata.csv", "file_name,text,,\n000.png,a,,,\n", 1)[0].caption == "a"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('{"file_name": "000.png", "text": ' + "[" * 100_000 + "]" * 100_000 + "}", "damaged"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "damaged"),
        ('{"file_name": "000.png", "label": ' + "1" * 5000 + "}", "damaged"),
        ('{"file_name": "000.png", "label": 1, "label": 2}', "conflict"),
        ("3", "damaged"),
    ],
    ids=["brackets", "objects", "long number", "key twice", "no object"],
)
def test_malformed_json_lines(tmp_path: Path, content: str, code: str) -> None:
    with refused(code, key="metadata.jsonl"):  # type: ignore[arg-type]
        described(tmp_path, "metadata.jsonl", content + "\n")


@pytest.mark.parametrize("name", ["dataset.json", "000.json"])
def test_brackets_in_other_json_files(tmp_path: Path, name: str) -> None:
    contents: Contents = {**files(1), name: '{"labels": ' + "[" * 100_000}
    with refused("damaged", key=name):
        open_source(folder(tmp_path / "set", contents))
    with refused("damaged", key=f"a.tar/{name}"):
        open_source(tarred(tmp_path / "a.tar", contents))


@pytest.mark.parametrize("content", ["[]", '{"labels": 3}', '{"labels": [[1, 2, 3]]}', "{}"])
def test_another_form_of_dataset_json(tmp_path: Path, content: str) -> None:
    with refused("damaged", key="dataset.json"):
        described(tmp_path, "dataset.json", content)


def test_metadata_parquet(tmp_path: Path) -> None:
    path = folder(tmp_path, files(2)) / "metadata.parquet"
    pq.write_table(pa.table([["000.png"], ["a"], ["b"]], names=["file_name", "text", "text"]), path)
    with refused("damaged", key="metadata.parquet"):
        open_source(tmp_path)
    path.write_bytes(b"junk")
    with refused("damaged", key="metadata.parquet"):
        open_source(tmp_path)
