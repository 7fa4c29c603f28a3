"""Which caption and which class belong to which file of a tree: metadata files, side files, class folders."""

from __future__ import annotations

import csv
import difflib
import io
import json
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq

from carrara.data.columns import LABELS, choose_caption, named, numbers_or_names
from carrara.data.decode import IMAGE_SUFFIXES, UnreadablePicture
from carrara.data.trees import Tree, base_name, suffix_of
from carrara.errors import UserError, nearest

METADATA = (
    "metadata.jsonl",
    "metadata.csv",
    "metadata.parquet",
    "dataset.json",
)  # the last as EDM and StyleGAN write it
SIDE_SUFFIXES = (".txt", ".caption")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
_SHOWN = 5

Row = dict[str, object]


@dataclass
class Described:
    """What is known about some files, in sorted order.

    Attributes:
        names: the files.
        captions, classes: a text and a class for each, or None.
        sentence: where this was found.
        notices: what is worth saying.
        known_classes: classes that occur in other splits.
    """

    names: list[str]
    captions: Sequence[str] | None
    classes: list[object] | None
    sentence: str
    notices: list[str]
    known_classes: Sequence[object] = ()


class SideFiles(Sequence[str]):
    """The text beside each picture, read when asked for."""

    def __init__(self, tree: Tree, names: Sequence[str]) -> None:
        self._tree = tree
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _text(self._tree, self._names[index]).strip()


def find_metadata(tree: Tree) -> list[str]:
    """The metadata files of a tree, by name, at the root and in sub-folders."""
    return [name for name in tree.sizes if base_name(name) in METADATA and not _says_nothing(tree, name)]


def _says_nothing(tree: Tree, name: str) -> bool:
    """EDM writes a dataset.json without labels beside images without classes."""
    return name.endswith("dataset.json") and not _edm_rows(_text(tree, name), tree.where(name))


def misspelt_metadata(tree: Tree) -> list[str]:
    """Files whose name looks like a metadata file but is not one."""
    return [
        name
        for name in tree.sizes
        if suffix_of(name) not in IMAGE_SUFFIXES
        and suffix_of(name) not in SIDE_SUFFIXES
        and base_name(name) not in METADATA
        and difflib.get_close_matches(base_name(name).lower(), METADATA, n=1, cutoff=0.85)
    ]


def from_metadata(
    tree: Tree, pictures: Sequence[str], folder: str, files: Sequence[str], caption_column: str | None, limit: float
) -> Described:
    """What metadata files say, each about the files at and below its own folder.

    Rows without a file and files without a row are left out, and named, up to the share `limit`. Rows about the
    files of other splits are passed over.

    Args:
        pictures: the files wanted, all below `folder`.

    Raises:
        UserError: a row cannot be read, a column is missing, or more names than `limit` do not match.
    """
    rows: dict[str, Row] = {}
    others: list[Row] = []
    extra: list[str] = []
    wanted = set(pictures)
    near = [file for file in files if folder.startswith(_folder(file)) or _folder(file).startswith(folder)]
    for file in files:
        table = _rows(tree, file)
        key = _file_column(table[0], tree.where(file))
        for row in table:
            name = posixpath.normpath(_folder(file) + str(row.get(key) or ""))
            if name in wanted:
                rows[name] = row
            elif name in tree.sizes or file not in near:
                others.append(row)
            else:
                extra.append(name)
    where = " and ".join(tree.where(file) for file in near or files)
    missing = [name for name in pictures if name not in rows]
    names = [name for name in pictures if name in rows]
    notices = _unmatched(where, len(rows), len(pictures), extra, missing, limit)
    described = _from_rows([rows[name] for name in names], caption_column, where)
    label = next((c for c in LABELS if described.classes and all(c in row for row in others)), None)
    return replace(
        described,
        names=names,
        notices=notices + described.notices,
        known_classes=[] if label is None else [row[label] for row in others],
    )


def _folder(file: str) -> str:
    return file.removesuffix(base_name(file))


def _from_rows(rows: Sequence[Row], caption_column: str | None, where: str) -> Described:
    """The caption and label columns of some rows, one row a picture.

    Raises:
        UserError: there is neither, or the caption column asked for is not there, or a label is.
    """
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in FILE_COLUMNS]
    texts = [c for c in columns if all(isinstance(row.get(c), str | list | None) for row in rows)]
    caption = choose_caption(texts, columns, caption_column, where)
    label = next((c for c in LABELS if c in columns and c != caption), None)
    if caption is None and label is None:
        raise UserError(
            f"{where} has neither a caption nor a label column among {', '.join(columns)}: "
            "name the caption column (data.caption_column), or call it 'text'."
        )
    captions = None if caption is None else [_first(row.get(caption)) for row in rows]
    classes = None if label is None else [row.get(label) for row in rows]
    notices = []
    if captions is not None and (empty := captions.count("")):
        notices.append(f"captions are empty in {where}: {empty} of {len(rows)}.")
    said = [f"captions in '{caption}'"] * (caption is not None) + [f"classes in '{label}'"] * (label is not None)
    return Described([], captions, classes, f"{where} ({', '.join(said)})", notices)


def from_side_files(tree: Tree, pictures: Sequence[str], limit: float) -> Described | None:
    """A text file of the same stem beside each picture; None where no picture has one.

    Raises:
        UserError: the share of pictures without one is above `limit`.
    """
    beside: dict[str, str] = {}
    for name in tree.sizes:
        stem, suffix = stem_of(name)
        if suffix in SIDE_SUFFIXES:
            beside.setdefault(stem, name)
    names = [name for name in pictures if stem_of(name)[0] in beside]
    if not names:
        return None
    missing = [name for name in pictures if stem_of(name)[0] not in beside]
    stems = {stem_of(name)[0] for name in pictures}
    extra = [name for stem, name in beside.items() if stem not in stems and not _is_prose(name)]
    suffix = stem_of(beside[stem_of(names[0])[0]])[1]
    notices = _unmatched(f"the {suffix} files", len(names), len(pictures), extra, missing, limit)
    captions = SideFiles(tree, [beside[stem_of(name)[0]] for name in names])
    return Described(names, captions, None, f"a {suffix} caption beside each image", notices)


def from_shard_files(tree: Tree, pictures: Sequence[str], limit: float, caption_column: str | None) -> Described | None:
    """Webdataset's samples: the files of one key, KEY.jpg with KEY.txt, KEY.cls or KEY.json beside it.

    Raises:
        UserError: a side file cannot be read, or too many pictures lack one.
    """
    described = from_side_files(tree, pictures, limit) or Described(list(pictures), None, None, "", [])
    stems = [stem_of(name)[0] for name in described.names]
    if all(f"{stem}.json" in tree.sizes for stem in stems) and (described.captions is None or caption_column):
        rows = [_json_row(tree, f"{stem}.json") for stem in stems]
        described = replace(_from_rows(rows, caption_column, "the .json files"), names=described.names)
    if all(f"{stem}.cls" in tree.sizes for stem in stems):
        texts = [_text(tree, f"{stem}.cls").strip() for stem in stems]
        said = f"{described.sentence} and classes in .cls" if described.sentence else "classes in .cls"
        described = replace(described, classes=numbers_or_names(texts), sentence=said)
    return described if described.sentence else None


def _json_row(tree: Tree, name: str) -> Row:
    try:
        row = json.loads(_text(tree, name))
    except json.JSONDecodeError as error:
        raise UserError(f"{tree.where(name)} is no JSON: {error}.") from error
    return row if isinstance(row, dict) else {}


def stem_of(name: str) -> tuple[str, str]:
    """A file's name without its ending, and the ending in lower case."""
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()


def _is_prose(name: str) -> bool:
    """Whether a text file without a picture is ordinary in a folder of pictures."""
    return stem_of(base_name(name))[0].lower() in {"readme", "license", "licence", "classes", "labels", "notes"}


def _rows(tree: Tree, file: str) -> list[Row]:
    where = tree.where(file)
    if file.endswith(".parquet"):
        return _parquet_rows(tree, file)
    text = _text(tree, file)
    rows: list[Row] = []
    if file.endswith("dataset.json"):
        rows = _edm_rows(text, where)
    elif file.endswith(".csv"):
        rows = _csv_rows(text)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} line {number} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise UserError(f'{where} line {number} is no JSON object of the form {{"file_name": …}}.')
            rows.append(row)
    if not rows:
        raise UserError(f"{where} has no rows: write one for each image, or remove the file.")
    return rows


def _parquet_rows(tree: Tree, file: str) -> list[Row]:
    try:
        rows: list[Row] = pq.read_table(io.BytesIO(tree.read(file))).to_pylist()
    except (pa.ArrowException, UnreadablePicture) as error:
        raise UserError(f"{tree.where(file)} cannot be read as parquet: {error}.") from error
    if not rows:
        raise UserError(f"{tree.where(file)} has no rows: write one for each image, or remove the file.")
    return rows


def _csv_rows(text: str) -> list[Row]:
    """Rows of texts; a label column of numbers becomes numbers, as it would be in JSON."""
    rows: list[Row] = [dict(row) for row in csv.DictReader(io.StringIO(text))]
    for column in named(LABELS, rows[0] if rows else ()):
        for row, value in zip(rows, numbers_or_names([str(row[column] or "") for row in rows]), strict=True):
            row[column] = value
    return rows


def _edm_rows(text: str, where: str) -> list[Row]:
    """{"labels": [["00000/img.png", 6], …]}, the description in the data set zips of EDM and StyleGAN."""
    try:
        pairs = json.loads(text)["labels"]
        return [{"file_name": name, "label": label} for name, label in pairs or []]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where} is not of the form {{"labels": [["NAME.png", 0], …]}}.') from error


def _text(tree: Tree, name: str) -> str:
    try:
        return tree.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{tree.where(name)} is not UTF-8 text: save it as UTF-8.") from error
    except UnreadablePicture as error:
        raise UserError(f"{tree.where(name)} cannot be read: {error}.") from error


def _file_column(row: Row, where: str) -> str:
    for column in FILE_COLUMNS:
        if column in row:
            return column
    raise UserError(f"{where} has no column 'file_name': {nearest('file_name', map(str, row))}")


def _first(value: object) -> str:
    if isinstance(value, list):
        value = value[0] if value else ""
    return "" if value is None else str(value)


def _unmatched(
    where: str, matched: int, images: int, extra: Sequence[str], missing: Sequence[str], limit: float
) -> list[str]:
    sentences = []
    if extra:
        sentences.append(f"names without an image: {len(extra)} ({_some(extra)})")
    if missing:
        sentences.append(f"images without a row or text: {len(missing)} of {images} ({_some(missing)})")
    if not sentences:
        return []
    told = f"{where}: {matched} matched, {', '.join(sentences)}"
    if len(extra) + len(missing) > limit * max(images, 1):
        raise UserError(f"{told}: mend the names, or raise data.unreadable_limit to leave them out.")
    return [f"{told}; these are left out."]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
