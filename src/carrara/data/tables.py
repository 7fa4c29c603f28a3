"""Tables: parquet files, Arrow files and data sets that Hugging Face `datasets` saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from carrara.data.decode import UnreadablePicture
from carrara.data.source import Source, counted
from carrara.data.splits import choose_split, refuse_split
from carrara.errors import UserError, nearest

LABELS = ("label", "labels", "class", "fine_label", "category")
"""Column names taken for a class, in this order, where no column is declared as one."""
CAPTIONS = ("text", "caption", "captions", "prompt", "description")
"""Column names taken for a caption, in this order."""
_NO_CAPTIONS = {*LABELS, "id", "key", "name", "file_name", "filename", "path", "url", "source", "license", "split"}
_IN_MEMORY_BYTES = 2**30
_LARGEST_NUMBER = 2**16 - 1


class Column:
    """One column of a table, read row by row where it lies (in memory, or mapped from a file)."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = column.chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Any:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._chunks[chunk][row - int(self._starts[chunk])].as_py()


class Texts(Sequence[str]):
    """A text column: an absent text is the empty one, of a list of texts the first is taken."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = Column(column)

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        text = self._column[index]
        if isinstance(text, list):
            text = text[0] if text else ""
        return text or ""


class TablePictures:
    """Pictures in a column of bytes, or of structs with `bytes` or `path`."""

    def __init__(self, column: pa.ChunkedArray, name: str, folder: Path) -> None:
        self._column = Column(column)
        self._name = name
        self._folder = folder
        self.encoded_bytes = int(column.nbytes)

    def __len__(self) -> int:
        return len(self._column)

    def name(self, index: int) -> str:
        return f"{self._name} row {index}"

    def read(self, index: int) -> bytes:
        cell = self._column[index]
        if isinstance(cell, dict):
            path = cell.get("path")
            cell = cell.get("bytes")
            if cell is None and path:
                return self._read_file(path)
        if cell is None:
            raise UnreadablePicture("the cell is empty")
        return bytes(cell)

    def _read_file(self, path: str) -> bytes:
        try:
            return (self._folder / path).read_bytes()
        except OSError as error:
            raise UnreadablePicture(f"{path}: {error.strerror}") from error


def open_parquet(
    files: Sequence[Path], name: str, caption_column: str | None = None, other_splits: Sequence[Path] = ()
) -> Source:
    """Parquet files as one data set, row after row.

    Up to 1 GiB is read into memory; beyond that Hugging Face `datasets` converts it once to Arrow in its own
    cache and maps it.

    Args:
        other_splits: files whose classes are numbered with those of `files`.

    Raises:
        UserError: a file is missing or damaged, or holds no column of images.
    """
    import pyarrow.parquet as pq

    kind = "a parquet file" if len(files) == 1 else f"{len(files)} parquet files"
    folder = files[0].parent

    def known(label: str) -> set[object]:
        tables = (pq.read_table(file, columns=[label]) for file in other_splits if label in pq.read_schema(file).names)
        return {value for table in tables for value in table.column(label).unique().to_pylist()}

    try:
        if sum(_uncompressed_bytes(file) for file in files) <= _IN_MEMORY_BYTES:
            table = pa.concat_tables([pq.read_table(file, memory_map=True) for file in files])
            return _from_table(table, name, kind, folder, caption_column, known)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the parquet of {name} is missing, damaged or of several schemas: {error}.") from error
    import datasets

    data = datasets.Dataset.from_parquet([str(file) for file in files])
    source = _from_table(data.data.table, name, kind, folder, caption_column, known)
    source.notices.append(f"the parquet lies converted to Arrow in {Path(data.cache_files[0]['filename']).parent}.")
    return source


def _uncompressed_bytes(file: Path) -> int:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    return sum(int(metadata.row_group(i).total_byte_size) for i in range(metadata.num_row_groups))


def open_arrow(path: Path, split: str, name: str, caption_column: str | None = None) -> Source:
    """What `datasets.save_to_disk` wrote (one data set or a dictionary of splits), memory-mapped.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{path} cannot be loaded as a saved data set: {error}.") from error
    splits = data if isinstance(data, datasets.DatasetDict) else {}
    if splits:
        data = data[choose_split(split, tuple(data), path)]
    elif str(data.split) != split:
        refuse_split(split, path)
    if data._indices is not None:  # rows were selected or shuffled before saving
        data = data.flatten_indices()

    def known(label: str) -> set[object]:
        return {value for part in splits.values() if label in part.column_names for value in part.unique(label)}

    return _from_table(data.data.table, name, "a data set saved by Hugging Face datasets", path, caption_column, known)


def _from_table(
    table: pa.Table,
    name: str,
    kind: str,
    folder: Path,
    caption_column: str | None,
    known: Callable[[str], set[object]],
) -> Source:
    """A table as a data set; `known` gives the classes that other splits have in a column."""
    features = _features(table)
    image = _image_column(table, features, name)
    label, class_names = _label_column(table, features)
    caption = _caption_column(table, caption_column, name)
    if len(table) == 0:
        raise UserError(f"{name} has no rows.")
    labels = None
    if label is not None:
        others = set() if class_names else known(label)
        labels, class_names = _labels(table.column(label), class_names, f"column '{label}' of {name}", others)
    used = [f"images in '{image}'"]
    used += [f"{len(class_names)} classes in '{label}'"] if class_names else []
    used += [f"captions in '{caption}'"] if caption else []
    return Source(
        name=name,
        layout=f"{kind}: {len(table)} rows, {', '.join(used)}",
        pictures=TablePictures(table.column(image), Path(name).name, folder),
        labels=labels,
        captions=None if caption is None else Texts(table.column(caption)),
        class_names=class_names,
    )


def _features(table: pa.Table) -> dict[str, Any]:
    """What Hugging Face `datasets` wrote about the columns into the schema."""
    import datasets

    return dict(datasets.Features.from_arrow_schema(table.schema))


def _image_column(table: pa.Table, features: dict[str, Any], name: str) -> str:
    declared = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
    by_type = [field.name for field in table.schema if _holds_bytes(field.type)]
    found = declared or by_type
    if not found:
        columns = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise UserError(f"{name} has no column of encoded images; its columns are: {columns}.")
    return "image" if "image" in found else found[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_column(table: pa.Table, features: dict[str, Any]) -> tuple[str | None, tuple[str, ...] | None]:
    for key, feature in features.items():
        if type(feature).__name__ == "ClassLabel":
            return key, tuple(feature.names)
    for key in LABELS:
        if key in table.column_names and _is_class(table.schema.field(key).type):
            return key, None
    return None, None


def _is_class(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _labels(
    column: pa.ChunkedArray, names: tuple[str, ...] | None, what: str, known: set[object]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    values = column.to_pylist()
    if any(value is None for value in values):
        raise UserError(f"{what} has {counted(values.count(None), 'empty cell')}: every image needs its class.")
    if names is None:
        return class_numbers(values, known - {None}, what)
    labels = np.asarray(values, dtype=np.int64)
    if labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f"{what} holds the label {labels.max()} but names only {len(names)} classes.")
    return labels, names


def class_numbers(
    values: Sequence[object], known: Iterable[object] = (), where: str = "the data"
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The number of each sample's class, and the names of the classes.

    Integers from 0 up are the numbers themselves, so that a split that lacks a class does not shift the others;
    other integers are numbered by size, texts in alphabetical order.

    Args:
        values: the class of each sample.
        known: classes of other splits, to be numbered with them.
        where: the data set, for messages.

    Raises:
        UserError: a class is neither an integer nor a text that is not empty, or both kinds are mixed; the first such
            row is named.
    """
    kind = type(values[0]) if len(values) else int
    for row, value in enumerate((*values, *known)):
        place = f"row {row}" if row < len(values) else "another split"
        if type(value) not in (int, str) or value == "":
            raise UserError(f"{where}, {place}: {value!r} is no class: a class is a whole number or a name.", key=where)
        if type(value) is not kind:
            raise UserError(
                f"{where}, {place}: the class {value!r} is a {'number' if kind is str else 'text'}, the first one is "
                "not: write all classes in one way.",
                key=where,
                code="mismatch",
            )
    every = {*values, *known}
    if all(isinstance(value, int) and 0 <= value <= _LARGEST_NUMBER for value in every):
        numbers = np.asarray(values, dtype=np.int64)
        return numbers, tuple(map(str, range(max(int(str(value)) for value in every) + 1)))
    ordered = sorted(every, key=_class_order)
    number_of = {name: i for i, name in enumerate(ordered)}
    return np.array([number_of[value] for value in values], dtype=np.int64), tuple(map(str, number_of))


def _class_order(value: object) -> tuple[int, str]:
    """Numbers by size, texts in alphabetical order."""
    return (value, "") if isinstance(value, int) else (0, str(value))


def _caption_column(table: pa.Table, wanted: str | None, name: str) -> str | None:
    texts = [field.name for field in table.schema if _is_text(field.type)]
    return choose_caption(texts, table.column_names, wanted, name)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def choose_caption(texts: Sequence[str], columns: Sequence[str], wanted: str | None, name: str) -> str | None:
    """The caption column: the one asked for, else the first known name, else the only text column.

    Raises:
        UserError: the column asked for is absent or holds no text.
    """
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"{name} has no caption column '{wanted}': {nearest(wanted, columns)}")
        if wanted not in texts:
            raise UserError(f"column '{wanted}' of {name} holds no text: text columns are {', '.join(texts)}.")
        return wanted
    named = [key for key in CAPTIONS if key in texts]
    if named:
        return named[0]
    free = [key for key in texts if key.lower() not in _NO_CAPTIONS]
    return free[0] if len(free) == 1 else None
