"""Each mistake about data gets one sentence that names the file and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from carrara.data import Batches, Preprocess, open_source
from carrara.data.batches import Cache
from carrara.errors import Code, UserError
from tests.data.builders import Contents, encoded, files, folder, jsonl, picture, png, tarred, zipped
from tests.errors import refused
from tests.errors import refused as refuses


def sentence(path: Path | str, code: Code, **arguments: object) -> str:
    """The sentence that refuses to open `path`, after its code and key."""
    with pytest.raises(UserError) as caught:
        open_source(path, **arguments)  # type: ignore[arg-type]
    text = str(caught.value)
    assert caught.value.code == code, text
    assert caught.value.key
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    folder(tmp_path, {"photos/1.png": png(1)})
    assert "did you mean 'photos'" in sentence(tmp_path / "photo", "missing")
    assert str(tmp_path / "no" / "where") in sentence(tmp_path / "no" / "where", "missing")


def test_empty_folder(tmp_path: Path) -> None:
    assert "is empty" in sentence(tmp_path, "missing")


def test_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    text = sentence(folder(tmp_path, {"a.txt": "x", "b.pdf": "y"}), "missing")
    assert ".pdf" in text
    assert "no image" in text


def test_a_single_image_is_no_data_set(tmp_path: Path) -> None:
    assert "give the folder" in sentence(folder(tmp_path, files(1)) / "000.png", "invalid")


def test_an_unknown_file(tmp_path: Path) -> None:
    assert "no data set" in sentence(folder(tmp_path, {"a.rar": "x"}) / "a.rar", "invalid")


@pytest.mark.parametrize("limit", [-0.1, 1.5])
def test_an_impossible_limit(limit: float) -> None:
    assert "between 0 and 1" in sentence("digits", "invalid", unreadable_limit=limit)


DEFECTS: dict[str, bytes] = {"truncated": png(1, 64, 64)[:900], "zero-byte": b"", "not an image": b"hello"}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_unreadable_files_are_named_and_skipped_under_the_limit(tmp_path: Path, defect: str, cache: Cache) -> None:
    path = folder(tmp_path, {**files(19), "bad.png": DEFECTS[defect]})
    source = open_source(path, unreadable_limit=0.05)
    batches = Batches(source, Preprocess(8, 8), batch_size=20, cache=cache)
    assert "bad.png" not in batches.at(0).names
    assert len(batches.at(0).names) == 20
    assert len(source.warnings) == 1
    assert "1 of 20 images" in source.warnings[0]
    assert "bad.png" in source.warnings[0]


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_unreadable_files_are_refused_above_the_limit(tmp_path: Path, defect: str, cache: Cache) -> None:
    source = open_source(folder(tmp_path, {**files(19), "bad.png": DEFECTS[defect]}), unreadable_limit=0.04)
    with pytest.raises(UserError, match=r"1 of 20 .*bad\.png .*limit of 4\.00%.*data\.unreadable_limit"):
        Batches(source, Preprocess(8, 8), batch_size=20, cache=cache).at(0)


def test_the_first_few_of_many_unreadable_are_named(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {**files(2), **{f"bad{i}.png": b"" for i in range(9)}}))
    with pytest.raises(UserError, match="and 4 more"):  # a golden sentence
        Batches(source, Preprocess(8, 8), batch_size=11).at(0)


def test_nothing_readable_ends_instead_of_spinning(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {f"{i}.png": b"" for i in range(4)}), unreadable_limit=1.0)
    with refuses("damaged"):
        Batches(source, Preprocess(8, 8), batch_size=2).at(0)


def test_an_unreadable_picture_that_is_requested_is_named(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {**files(1), "bad.png": b""}))
    with refused("damaged", key="bad.png"):
        source[1]


def test_conversions_are_stated(tmp_path: Path) -> None:
    contents: Contents = {
        "cmyk.jpg": encoded(picture(1).convert("CMYK"), "jpeg"),
        "palette.png": encoded(picture(2).quantize(8)),
        "plain.png": png(3),
    }
    source = open_source(folder(tmp_path, contents))
    Batches(source, Preprocess(8, 8), batch_size=3).at(0)
    assert source.warnings == ["1 image: CMYK to RGB.", "1 image: palette to RGB."]


def test_fewer_images_than_a_batch(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, files(3)))
    with pytest.raises(UserError, match=r"holds 3 images, fewer than one batch of 4: set training\.batch_size to 3"):
        Batches(source, Preprocess(8, 8), batch_size=4)


@pytest.mark.parametrize("arguments", [{"batch_size": 3, "world": 2}, {"rank": 2, "world": 2}, {"batch_size": 0}])
def test_batches_that_cannot_be_shared(tmp_path: Path, arguments: dict[str, int]) -> None:
    source = open_source(folder(tmp_path, files(4)))
    with pytest.raises(UserError, match="batch"):
        Batches(source, Preprocess(8, 8), **{"batch_size": 4, **arguments})  # type: ignore[arg-type]


ROWS = [{"file_name": f"{i:03d}.png", "text": f"no {i}"} for i in range(20)]


def test_caption_rows_without_an_image_are_listed(tmp_path: Path) -> None:
    rows = jsonl(*ROWS, {"file_name": "gone.png", "text": "?"})
    path = folder(tmp_path, {**files(20), "metadata.jsonl": rows})
    text = sentence(path, "mismatch")
    for word in ("metadata.jsonl", "20 matched", "names without an image: 1 (gone.png)", "data.unreadable_limit"):
        assert word in text
    assert "left out" in open_source(path, unreadable_limit=0.05).warnings[0]


def test_images_without_a_caption_row_are_listed(tmp_path: Path) -> None:
    path = folder(tmp_path, {**files(20), "metadata.jsonl": jsonl(*ROWS[:19])})
    assert "images without a row or text: 1 of 20 (019.png)" in sentence(path, "mismatch")
    source = open_source(path, unreadable_limit=0.05)
    assert len(source) == 19
    assert "019.png" in source.warnings[0]


def test_images_without_a_text_file_are_listed(tmp_path: Path) -> None:
    contents: Contents = {**files(3), "000.txt": "zero", "001.txt": "one", "nobody.txt": "?", "README.txt": "about"}
    text = sentence(folder(tmp_path, contents), "mismatch")
    assert "images without a row or text: 1 of 3 (002.png)" in text
    assert "names without an image: 1 (nobody.txt)" in text
    assert "README" not in text


def test_caption_column_missing_names_the_nearest(tmp_path: Path) -> None:
    path = folder(tmp_path, {**files(20), "metadata.jsonl": jsonl(*ROWS)})
    text = sentence(path, "missing", caption_column="txet")
    assert "metadata.jsonl" in text
    assert "did you mean 'text'" in text


def test_caption_column_without_any_metadata_says_where_it_looked(tmp_path: Path) -> None:
    text = sentence(folder(tmp_path, files(3)), "missing", caption_column="text")
    for word in ("metadata.jsonl", "metadata.csv", "root", "sub-folder"):
        assert word in text


@pytest.mark.parametrize("contents", [{"a/1.png": png(1), "b/2.png": png(2)}, {"1.png": png(1), "1.txt": "one"}])
def test_a_caption_column_is_never_ignored(tmp_path: Path, contents: Contents) -> None:
    assert "no caption column 'text'" in sentence(folder(tmp_path, contents), "missing", caption_column="text")
    assert "has no captions" in sentence("digits", "missing", caption_column="text")


def test_an_empty_path(tmp_path: Path) -> None:
    assert "path of the data is empty" in sentence("", "invalid")


def test_a_misspelt_metadata_file_is_pointed_out(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, {**files(20), "metadata.json1": jsonl(*ROWS)}))
    assert "metadata.json1 is not read" in source.warnings[0]


METADATA_FAULTS: dict[str, tuple[str, str, Code]] = {
    "no rows": ("", "no rows", "missing"),
    "bad json": ('{"file_name": "000.png", "text": \n', "line 1 is no JSON", "damaged"),
    "no object": ("[1, 2]\n", "line 1 is no JSON object", "damaged"),
    "no file column": (jsonl({"file_nam": "000.png", "text": "x"}), "did you mean 'file_nam'", "missing"),
    "no caption": (
        jsonl(*({"file_name": f"00{i}.png", "width": 3} for i in (0, 1))),
        "neither a caption nor a label column",
        "missing",
    ),
    "no label in a row": (jsonl(ROWS[0] | {"label": 1}, ROWS[1]), "001.png: an empty cell is no class", "invalid"),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_damaged_metadata(tmp_path: Path, fault: str) -> None:
    content, word, code = METADATA_FAULTS[fault]
    assert word in sentence(folder(tmp_path, {**files(2), "metadata.jsonl": content}), code)


def test_metadata_that_is_no_utf8(tmp_path: Path) -> None:
    assert "UTF-8" in sentence(
        folder(tmp_path, {**files(1), "metadata.csv": b"file_name,text\n000.png,caf\xe9\n"}), "damaged"
    )


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize(
    ("build", "word", "code"),
    [
        (lambda p: folder(p, {"a.tar": b"junk" * 300}) / "a.tar", "uncompressed tar", "damaged"),
        (lambda p: cut(tarred(p / "a.tar", {"1.png": png(1, 90, 90)})), "cut off|uncompressed tar", "damaged"),
        (lambda p: folder(p, {"a.zip": b"junk"}) / "a.zip", "zip archive", "damaged"),
        (lambda p: folder(p, {"a.parquet": b"junk"}) / "a.parquet", "parquet", "damaged"),
        (lambda p: tarred(p / "a.tar", {"readme.md": "x"}), "no image", "missing"),
        (lambda p: zipped(p / "a.zip", {}), "is empty", "missing"),
    ],
    ids=["tar junk", "tar cut", "zip junk", "parquet junk", "tar without images", "empty zip"],
)
def test_damaged_archives(tmp_path: Path, build: Callable[[Path], Path], word: str, code: Code) -> None:
    assert re.search(word, sentence(build(tmp_path), code))


def test_a_named_shard_that_is_missing(tmp_path: Path) -> None:
    tarred(tmp_path / "0.tar", files(1))
    assert "1.tar is missing" in sentence(str(tmp_path / "{0..1}.tar"), "missing")


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar.zst"])
def test_compressed_shards_are_to_be_unpacked_first(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "set", {name: b"\x1f\x8b"})
    for given in (path, path / name):
        text = sentence(given, "unsupported")
        assert name in text
        assert "decompress them to plain .tar" in text
    tarred(path / "1.tar", files(2))
    assert name in sentence(path, "unsupported"), "half of the shards would be left out silently"


def test_a_packed_file_beside_images_disturbs_nobody(tmp_path: Path) -> None:
    assert len(open_source(folder(tmp_path, {**files(2), "backup.tar.gz": b"\x1f\x8b"}))) == 2


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_that_is_not_there(tmp_path: Path, split: str) -> None:
    assert split in sentence(folder(tmp_path / "f", files(2)), "unknown", split=split)
    tarred(tmp_path / "t" / "0.tar", files(1))
    assert split in sentence(tmp_path / "t", "unknown", split=split)
