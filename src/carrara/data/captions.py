"""Which caption and which class belong to which file of a tree: metadata files, and files next to the pictures."""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from carrara.data.columns import CAPTIONS, LABELS, choose_caption, left_out, named, numbers_or_names
from carrara.data.decode import IMAGE_SUFFIXES
from carrara.data.rows import Row, edm_rows, parse_json, read_text, rows_of
from carrara.data.source import printable
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
_HALF = re.compile(r"[\ud800-\udfff]")
_SHOWN = 5
_ROWS_LOOKED_AT = 100


@dataclass(frozen=True)
class Described:
    """What is known about some files, in sorted order.

    Attributes:
        names: the files.
        captions, classes: a text and a class for each, or None.
        found: where these were found, in words.
        notices: what is worth saying.
        known_classes: classes that occur in other splits.
    """

    names: Sequence[str]
    captions: Sequence[str] | None = None
    classes: Sequence[object] | None = None
    found: tuple[str, ...] = ()
    notices: list[str] = field(default_factory=list)
    known_classes: Sequence[object] = ()

    def with_captions(self, other: Described) -> Described:
        """The captions of `other`, which knows some of these files, together with these classes."""
        if other.captions is None or self.classes is None:
            return self
        class_of = dict(zip(self.names, self.classes, strict=True))
        return Described(
            other.names,
            other.captions,
            [class_of[name] for name in other.names],
            (*self.found, *other.found),
            [*self.notices, *other.notices],
            self.known_classes,
        )


class SideFiles(Sequence[str]):
    """The text file of each picture, read when it is needed."""

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
        return read_text(self._tree, self._names[index]).strip()


def find_metadata(tree: Tree) -> list[str]:
    """The metadata files of a tree, by name, at the root and in sub-folders."""
    return [name for name in tree.sizes if base_name(name) in METADATA and not _is_empty(tree, name)]


def _is_empty(tree: Tree, name: str) -> bool:
    """EDM writes a dataset.json without labels next to images without classes."""
    return name.endswith("dataset.json") and not edm_rows(read_text(tree, name), tree.where(name))


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
    """What metadata files contain, each about the files at and below its own folder.

    Rows without a file and files without a row are left out, and named, up to the fraction `limit`. Rows about the
    files of other splits are passed over.

    Args:
        pictures: the files wanted, all below `folder`.

    Raises:
        UserError: a row cannot be read, a column is missing, two rows of one file differ, or more names than `limit`
            do not match.
    """
    rows: dict[str, Row] = {}
    others: list[Row] = []
    extra: list[str] = []
    repeated = 0
    wanted = set(pictures)
    near = [file for file in files if folder.startswith(_folder(file)) or _folder(file).startswith(folder)]
    for file in files:
        table = rows_of(tree, file)
        key = _file_column(table[0], tree.where(file))
        for row in table:
            name = posixpath.normpath(_folder(file) + str(row.pop(key, None) or ""))
            if name in wanted:
                repeated += name in rows
                if rows.setdefault(name, row) != row:
                    raise UserError(
                        f"{tree.where(file)} has a second row for {tree.where(name)} that differs from the first: keep "
                        "one row for each image, several captions as a list.",
                        key=tree.where(file),
                        code="conflict",
                    )
            elif name in tree.sizes or file not in near:
                others.append(row)
            else:
                extra.append(name)
    where = " and ".join(tree.where(file) for file in near or files)
    missing = [name for name in pictures if name not in rows]
    names = [name for name in pictures if name in rows]
    notices = _unmatched(where, len(rows), len(pictures), extra, missing, limit)
    notices += [f"{where}: rows that repeat another: {repeated}."] if repeated else []
    described = _from_rows(names, [rows[name] for name in names], caption_column, where, others)
    if described.captions is None and described.classes is None:
        columns = ", ".join(dict.fromkeys(column for row in rows.values() for column in row))
        raise UserError(
            f"{where} has neither a caption nor a label column among {columns}: "
            "name the caption column (data.caption_column), or call it 'text'.",
            key=where,
            code="missing",
        )
    return replace(described, notices=notices + described.notices)


def _folder(file: str) -> str:
    return file.removesuffix(base_name(file))


def _from_rows(
    names: Sequence[str], rows: Sequence[Row], caption_column: str | None, where: str, others: Sequence[Row] = ()
) -> Described:
    """The caption and label columns of some rows, where there are such.

    Args:
        names: the picture of each row.
        others: rows of other splits.

    Raises:
        UserError: the requested caption column is not there, or captions are texts in some rows only.
    """
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in FILE_COLUMNS]
    some = [c for c in columns if any(_caption(row.get(c)) is not None for row in rows)]
    bad = {c: next((i for i, row in enumerate(rows) if _is_no_caption(row.get(c))), None) for c in some}
    for column in [c for c in (caption_column, *named(CAPTIONS, some)) if c in some][:1]:
        if (index := bad[column]) is not None:
            raise UserError(
                f"{where}, {printable(names[index])}: {rows[index][column]!r} in column '{column}' is no caption: "
                "write a text or a list of texts.",
                key=where,
            )
    texts = [c for c in some if bad[c] is None]
    caption = choose_caption(texts, columns, caption_column, where)
    flat = [c for c in columns if any(not isinstance(row.get(c), list | dict | None) for row in rows)]
    label = next((c for c in named(LABELS, flat) if c != caption), None)
    notices = left_out([c for c in columns if c not in (*texts, label)], label, caption, where)
    captions = None if caption is None else [_caption(row.get(caption)) or "" for row in rows]
    if captions is not None and (empty := captions.count("")):
        notices.append(f"captions are empty in {where}: {empty} of {len(rows)}.")
    if captions is not None and (halves := [text for text in captions if _HALF.search(text)]):
        notices.append(f"captions with half characters in {where}, replaced by \ufffd: {len(halves)} of {len(rows)}.")
        captions = [_HALF.sub("\ufffd", text) for text in captions]
    found = [f"captions in '{caption}'"] * (caption is not None) + [f"classes in '{label}'"] * (label is not None)
    return Described(
        names,
        captions,
        None if label is None else [row.get(label) for row in rows],
        (f"{where} ({', '.join(found)})",) if found else (),
        notices,
        [] if label is None else [row.get(label) for row in others],
    )


def _caption(value: object) -> str | None:
    """A text, or the first of a list of texts; None for anything else."""
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def _is_no_caption(value: object) -> bool:
    return value is not None and value != [] and _caption(value) is None


def from_side_files(tree: Tree, pictures: Sequence[str], limit: float, caption_column: str | None) -> Described:
    """The files of the same stem next to each picture: KEY.jpg with KEY.txt, KEY.caption, KEY.cls or KEY.json.

    Captions come from text files, else from a column of the .json files (only from there where one is requested);
    classes come from .cls files, else from the .json files. Pictures that lack a file that others have are left out,
    and named, up to the fraction `limit`.

    Raises:
        UserError: a side file cannot be read, or more pictures than `limit` lack one.
    """
    stems = {name: stem_of(name)[0] for name in pictures}
    sides: dict[str, dict[str, str]] = {"text": {}, ".cls": {}, ".json": {}}
    second = []
    for name in tree.sizes:
        stem, suffix = stem_of(name)
        side = sides.get("text" if suffix in SIDE_SUFFIXES else suffix, {})
        if side.setdefault(stem, name) != name:
            second.append(name)
    of_picture = {
        kind: {name: side[stem] for name, stem in stems.items() if stem in side} for kind, side in sides.items()
    }
    texts = of_picture["text"] if caption_column is None else {}
    numbers, json_files = of_picture[".cls"], of_picture[".json"]
    table = _from_json_files(tree, json_files, bool(texts), bool(numbers), caption_column)
    if table.captions is None and table.classes is None:
        json_files = {}
    used = [side for side in (texts, numbers, json_files) if side]
    names = [name for name in pictures if all(name in side for side in used)]
    if not used:
        return Described(pictures, notices=table.notices)
    row_of = {name: row for row, name in enumerate(table.names)}
    captions: Sequence[str] | None = SideFiles(tree, [texts[name] for name in names]) if texts else None
    classes: Sequence[object] | None = None
    if numbers:
        classes = numbers_or_names([read_text(tree, numbers[name]).strip() for name in names])
    if table.captions is not None:
        captions = [table.captions[row_of[name]] for name in names]
    if table.classes is not None:
        classes = [table.classes[row_of[name]] for name in names]
    kinds = [f"{what} in {_suffixes(side)} files" for what, side in (("captions", texts), ("classes", numbers)) if side]
    missing = [name for name in pictures if any(name not in side for side in used)]
    every = {stem_of(name)[0] for name in tree.sizes if suffix_of(name) in IMAGE_SUFFIXES}
    known = {**(sides["text"] if texts else {}), **(sides[".cls"] if numbers else {})}
    extra = [name for stem, name in known.items() if stem not in every and not _is_prose(name)]
    where = f"the {', '.join(_suffixes(side) for side in used)} files"
    notices = _unmatched(where, len(names), len(pictures), extra, missing, limit)
    notices += [f"second captions of one image, not read: {_some(second)}."] if second and texts else []
    return Described(names, captions, classes, (*kinds, *table.found), [*notices, *table.notices])


def _suffixes(side: Mapping[str, str]) -> str:
    return " and ".join(sorted({suffix_of(name) for name in side.values()}))


def _from_json_files(
    tree: Tree, files: Mapping[str, str], has_captions: bool, has_classes: bool, caption_column: str | None
) -> Described:
    """What the .json files of some pictures contain of what other files do not.

    Where captions lie in text files, a hundred of the files are looked at first: those of large collections hold
    addresses and sizes only, and take minutes to read.
    """
    if not files or (has_captions and has_classes):
        return Described([])

    def rows(names: Sequence[str]) -> list[Row]:
        values = [parse_json(read_text(tree, files[name]), tree.where(files[name]), files[name]) for name in names]
        objects = [value if isinstance(value, dict) else {} for value in values]
        labels = [set(named(LABELS, row)) for row in objects]
        return [
            {c: row[c] for c in row if (c in own if has_captions else not (has_classes and c in own))}
            for row, own in zip(objects, labels, strict=True)
        ]

    names = list(files)
    if has_captions and not any(rows(names[:: -(-len(names) // _ROWS_LOOKED_AT)])):
        return Described([])
    described = _from_rows(names, rows(names), caption_column, "the .json files")
    if described.captions is None and described.classes is None and not (has_captions or has_classes):
        notice = "the .json files hold neither captions nor classes: not read."
        return replace(described, notices=[*described.notices, notice])
    return described


def stem_of(name: str) -> tuple[str, str]:
    """A file's name without its ending, and the ending in lower case."""
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()


def _is_prose(name: str) -> bool:
    """Whether a text file without a picture is ordinary in a folder of pictures."""
    return stem_of(base_name(name))[0].lower() in {"readme", "license", "licence", "classes", "labels", "notes"}


def _file_column(row: Row, where: str) -> str:
    for column in named(FILE_COLUMNS, row):
        return column
    raise UserError(
        f"{where} has no column 'file_name': {nearest('file_name', map(str, row))}", key=where, code="missing"
    )


def _unmatched(
    where: str, matched: int, images: int, extra: Sequence[str], missing: Sequence[str], limit: float
) -> list[str]:
    """A notice of the names without an image and the images without a row.

    Raises:
        UserError: they are more than the fraction `limit`.
    """
    sentences = [f"names without an image: {len(extra)} ({_some(extra)})"] if extra else []
    if missing:
        sentences.append(f"images without a row or text: {len(missing)} of {images} ({_some(missing)})")
    if not sentences:
        return []
    sentence = f"{where}: {matched} matched, {', '.join(sentences)}"
    if len(extra) + len(missing) > limit * max(images, 1):
        raise UserError(
            f"{sentence}: correct the names, or raise data.unreadable_limit to leave them out.",
            key="data.unreadable_limit",
            code="mismatch",
        )
    return [f"{sentence}; these are left out."]


def _some(names: Iterable[str]) -> str:
    names = list(map(printable, names))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
