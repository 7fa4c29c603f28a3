"""Which caption and which class belong to which file of a tree: metadata files, side files, class folders."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import overload

from carrara.data.decode import UnreadablePicture
from carrara.data.tables import LABELS, choose_caption
from carrara.data.trees import Tree
from carrara.errors import UserError, nearest

METADATA = ("metadata.jsonl", "metadata.csv", "dataset.json")  # the last as EDM and StyleGAN write it
SIDE_SUFFIXES = (".txt", ".caption")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
_SHOWN = 5

Row = dict[str, object]


@dataclass
class Described:
    """The files that a description speaks of, in sorted order, with what it says of them."""

    names: list[str]
    captions: Sequence[str] | None
    classes: list[object] | None
    sentence: str
    notices: list[str]


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
    return [name for name in tree.sizes if PurePosixPath(name).name in METADATA and not _says_nothing(tree, name)]


def _says_nothing(tree: Tree, name: str) -> bool:
    """EDM writes a dataset.json without labels beside images without classes."""
    return name.endswith("dataset.json") and not _edm_rows(_text(tree, name), tree.where(name))


def misspelt_metadata(tree: Tree) -> list[str]:
    """Files whose name looks like a metadata file but is not one."""
    return [
        name
        for name in tree.sizes
        if PurePosixPath(name).name not in METADATA
        and difflib.get_close_matches(PurePosixPath(name).name.lower(), METADATA, n=1, cutoff=0.85)
    ]


def from_metadata(
    tree: Tree, pictures: Sequence[str], files: Sequence[str], caption_column: str | None, limit: float
) -> Described:
    """What metadata.jsonl / .csv files say, each about the files at and below its own folder.

    Rows without a file and files without a row are left out, and named, up to the share `limit`.

    Raises:
        UserError: a row cannot be read, a column is missing, or more names than `limit` do not match.
    """
    rows: dict[str, Row] = {}
    extra: list[str] = []
    known = set(pictures)
    for file in files:
        folder = file.removesuffix(PurePosixPath(file).name)
        table = _rows(tree, file)
        key = _file_column(table[0], tree.where(file))
        for row in table:
            name = str(PurePosixPath(folder + str(row.get(key) or "")))
            (rows.__setitem__(name, row) if name in known else extra.append(name))
    where = " and ".join(tree.where(file) for file in files)
    missing = [name for name in pictures if name not in rows]
    names = [name for name in pictures if name in rows]
    notices = _unmatched(where, len(rows), len(pictures), extra, missing, limit)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    texts = [c for c in columns if all(isinstance(row.get(c), str | list | None) for row in rows.values())]
    texts = [c for c in texts if c not in FILE_COLUMNS]
    caption = choose_caption(texts, columns, caption_column, where)
    label = next((c for c in LABELS if c in columns and c != caption), None)
    if caption is None and label is None:
        raise UserError(
            f"{where} has neither a caption nor a label column among {', '.join(columns)}: "
            "name the caption column (data.caption_column), or call it 'text'."
        )
    captions = None if caption is None else [_first(rows[name].get(caption)) for name in names]
    if captions is not None and (empty := captions.count("")):
        notices.append(f"{empty} of {len(names)} captions in {where} are empty.")
    classes = None
    if label is not None:
        classes = [rows[name].get(label) for name in names]
        if None in classes:
            raise UserError(f"{where} leaves the column '{label}' out of {classes.count(None)} rows: fill it.")
    said = [f"captions in '{caption}'"] * (caption is not None) + [f"classes in '{label}'"] * (label is not None)
    return Described(names, captions, classes, f"{where} ({', '.join(said)})", notices)


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
    """Webdataset's samples: files of one key, KEY.jpg with KEY.txt, KEY.cls or KEY.json beside it.

    Raises:
        UserError: a side file cannot be read, or too many pictures lack one.
    """
    described = from_side_files(tree, pictures, limit)
    names = list(pictures) if described is None else described.names
    captions = None if described is None else described.captions
    classes: list[object] | None = None
    said = [] if described is None else [described.sentence]
    notices = [] if described is None else described.notices
    stems = [stem_of(name)[0] for name in names]
    if all(f"{stem}.cls" in tree.sizes for stem in stems):
        texts = [_text(tree, f"{stem}.cls").strip() for stem in stems]
        classes = [int(t) if t.isdecimal() else t for t in texts]
        said.append("classes in .cls")
    elif all(f"{stem}.json" in tree.sizes for stem in stems):
        rows = [_json_row(tree, f"{stem}.json") for stem in stems]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        texts_in = [c for c in columns if all(isinstance(row.get(c), str | None) for row in rows)]
        label = next((c for c in LABELS if all(c in row for row in rows)), None)
        if captions is None or caption_column is not None:
            chosen = choose_caption(texts_in, columns, caption_column, "the .json files")
            if chosen is not None:
                captions = [_first(row.get(chosen)) for row in rows]
                said.append(f"captions in .json '{chosen}'")
        if label is not None:
            classes = [row[label] for row in rows]
            said.append(f"classes in .json '{label}'")
    if captions is None and classes is None:
        return None
    return Described(names, captions, classes, ", ".join(said), notices)


def _json_row(tree: Tree, name: str) -> Row:
    try:
        row = json.loads(_text(tree, name))
    except json.JSONDecodeError as error:
        raise UserError(f"{tree.where(name)} is no JSON: {error}.") from error
    return row if isinstance(row, dict) else {}


def stem_of(name: str) -> tuple[str, str]:
    """A file's name without its ending, and the ending in lower case."""
    path = PurePosixPath(name)
    return name.removesuffix(path.suffix), path.suffix.lower()


def _is_prose(name: str) -> bool:
    """Whether a text file without a picture is ordinary in a folder of pictures."""
    return PurePosixPath(name).stem.lower() in {"readme", "license", "licence", "classes", "labels", "notes"}


def _rows(tree: Tree, file: str) -> list[Row]:
    text = _text(tree, file)
    where = tree.where(file)
    rows: list[Row] = []
    if file.endswith("dataset.json"):
        rows = _edm_rows(text, where)
    elif file.endswith(".csv"):
        rows = [dict(row) for row in csv.DictReader(io.StringIO(text))]
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
        sentences.append(f"{len(extra)} names have no image ({_some(extra)})")
    if missing:
        sentences.append(f"{len(missing)} of {images} images have no caption ({_some(missing)})")
    if not sentences:
        return []
    told = f"{where}: {matched} matched, {' and '.join(sentences)}"
    if len(extra) + len(missing) > limit * max(images, 1):
        raise UserError(f"{told}: mend the names, or raise data.unreadable_limit to leave them out.")
    return [f"{told}; left out."]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
