"""Names in folders and archives: equal ones are refused, odd ones can be printed."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from carrara.data import open_source
from carrara.data.identity import identity
from tests.data.builders import files, folder, jsonl, picture, pixels, png, tarred
from tests.errors import refused


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("second", ["000.png", "./000.png"])
def test_equal_names_in_a_shard(tmp_path: Path, second: str) -> None:
    path = tar_of(tmp_path / "a.tar", [("000.png", png(0)), (second, png(1))])
    with refused("conflict", key=str(path)):
        open_source(path)


def test_equal_names_of_side_files_in_a_shard(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("000.png", png(0)), ("000.cls", b"0"), ("000.cls", b"1")])
    with refused("conflict", key=str(path)):
        open_source(path)


def test_equal_names_in_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own warning of the second member
        for number in range(2):
            archive.writestr("000.png", png(number))
    with refused("conflict", key=str(path)):
        open_source(path)


def test_equal_names_of_shards(tmp_path: Path) -> None:
    for part in "ab":
        tarred(tmp_path / part / "0.tar", files(1))
    with refused("conflict", key="0.tar"):
        open_source(tmp_path)


odd_names = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are no UTF-8")


@odd_names
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff/a.png"])
def test_file_names_that_are_no_utf8(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "set" / os.fsdecode(name)
    path.parent.mkdir(parents=True)
    picture(3).save(path)
    source = open_source(tmp_path / "set")
    assert np.array_equal(np.asarray(source[0].image), pixels(3))
    json.dumps([source[0].name, source.layout], ensure_ascii=False).encode()
    assert identity(source)


@odd_names
def test_class_folders_that_are_no_utf8(tmp_path: Path) -> None:
    for number, name in enumerate([b"caf\xe9", b"caf\xe8"]):
        path = tmp_path / os.fsdecode(name) / "a.png"
        path.parent.mkdir()
        picture(number).save(path)
    source = open_source(tmp_path)
    assert source.class_names is not None
    assert len(set(source.class_names)) == 2
    assert all(name.encode() for name in source.class_names)


@odd_names
@pytest.mark.parametrize("captions", ["metadata.jsonl", "000.txt"])
def test_notices_of_names_that_are_no_utf8(tmp_path: Path, captions: str) -> None:
    picture(0).save(tmp_path / os.fsdecode(b"caf\xe9.png"))
    path = folder(tmp_path, {**files(1), captions: jsonl({"file_name": "000.png", "text": "x"})})
    assert "caf" in open_source(path, unreadable_limit=1.0).warnings[0].encode().decode()


@odd_names
def test_members_of_a_shard_that_are_no_utf8(tmp_path: Path) -> None:
    source = open_source(tar_of(tmp_path / "a.tar", [(os.fsdecode(b"caf\xe9.png"), png(2))]))
    assert np.array_equal(np.asarray(source[0].image), pixels(2))
    assert source[0].name.encode()


@odd_names
@pytest.mark.parametrize("kind", ["folder", "nothing"])
def test_a_path_that_is_no_utf8(tmp_path: Path, kind: str) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    if kind == "nothing":
        with refused("missing"):
            open_source(path)
        return
    source = open_source(folder(path, files(1)))
    assert (source.name + source.layout).encode()
