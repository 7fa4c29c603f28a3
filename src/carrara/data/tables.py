"""Tables: parquet files, Arrow files and data sets that Hugging Face `datasets` saved."""

from __future__ import annotations

import bisect
import glob
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from carrara.data.columns import CAPTIONS, LABELS, choose_caption, class_numbers, left_out, named
from carrara.data.decode import IMAGE_SUFFIXES, UnreadablePicture
from carrara.data.source import Source
from carrara.data.splits import choose_split, refuse_split
from carrara.data.trees import suffix_of
from carrara.errors import UserError

_IN_MEMORY_BYTES = 2**30
_CELLS_LOOKED_AT = 4

Folders = Sequence[tuple[int, Path]]


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
    """Pictures in a column of bytes, or of structs with `bytes` or `path`.

    Args:
        folders: of each part of the table its number of rows and the folder from which its paths start.
    """

    def __init__(self, column: pa.ChunkedArray, name: str, folders: Folders) -> None:
        self._column = Column(column)
        self._name = name
        self._ends = list(itertools.accumulate(rows for rows, _ in folders))
        self._folders = [folder for _, folder in folders]
        self.encoded_bytes = int(column.nbytes)
        structs = column.chunks if pa.types.is_struct(column.type) else []
        self.reads_files = any(chunk.field("bytes").null_count > chunk.null_count for chunk in structs)

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
                return self._read_file(index, path)
        if cell is None:
            raise UnreadablePicture("the cell is empty")
        return bytes(cell)

    def _read_file(self, index: int, path: str) -> bytes:
        try:
            return (self._folders[bisect.bisect_right(self._ends, index)] / path).read_bytes()
        except OSError as error:
            raise UnreadablePicture(f"{path}: {error.strerror}") from error


def open_parquet(
    files: Sequence[Path], name: str, caption_column: str | None = None, other_splits: Sequence[Path] = ()
) -> Source:
    """Parquet files as one data set, row after row.

    Up to 1 GiB is read into memory; beyond that Hugging Face `datasets` converts it once to Arrow in its own
    cache and maps it. The files may differ in the order of columns and in the width of numbers.

    Args:
        other_splits: files whose classes are numbered with those of `files`.

    Raises:
        UserError: a file is missing or damaged, lacks a column that is needed, or holds no images.
    """
    kind = "a parquet file" if len(files) == 1 else f"{len(files)} parquet files"
    schemas = {file: _schema(file) for file in (*files, *other_splits)}
    schema, notices = _common_schema({file: schemas[file] for file in files}, caption_column)
    declared = _declared(schemas)

    def known(label: str) -> set[object]:
        return _distinct(pq.read_table(file, columns=[label]) for file in other_splits if label in schemas[file].names)

    sizes = [pq.read_metadata(file) for file in files]
    folders = [(size.num_rows, file.parent) for size, file in zip(sizes, files, strict=True)]
    if sum(size.row_group(i).total_byte_size for size in sizes for i in range(size.num_row_groups)) <= _IN_MEMORY_BYTES:
        try:
            table = pa.concat_tables([_read(file, schema) for file in files])
        except (pa.ArrowException, OSError) as error:
            raise _damaged(name, error) from error
    else:
        import datasets

        features = datasets.Features.from_arrow_schema(schema)
        data = datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files], features=features)
        table = data.data.table
        notices.append(f"the parquet lies converted to Arrow in {Path(data.cache_files[0]['filename']).parent}.")
    return _from_table(table, declared, name, kind, folders, caption_column, known, notices)


def _schema(file: Path) -> pa.Schema:
    """The columns of a file, dictionaries and views as the types that they stand for."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    double = [name for name, count in Counter(schema.names).items() if count > 1]
    if double:
        raise UserError(
            f"{file} has several columns '{double[0]}': rename all but one.", key=str(file), code="conflict"
        )
    return _plain_schema(schema)


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(_plain(field.type)) for field in schema], schema.metadata)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind.fields])
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _read(file: Path, schema: pa.Schema) -> pa.Table:
    return pq.read_table(file, columns=schema.names, memory_map=True).select(schema.names).cast(schema)


def _damaged(where: object, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"the parquet of {where} is missing or damaged: {reason}.", key=str(where), code="damaged")


def _common_schema(schemas: Mapping[Path, pa.Schema], caption_column: str | None) -> tuple[pa.Schema, list[str]]:
    """The columns that all files have, in types that hold the values of all, and a notice for each other column.

    Raises:
        UserError: another column has the name or the type of pictures, classes or captions.
    """
    fields, notices = [], []
    for name in dict.fromkeys(name for schema in schemas.values() for name in schema.names):
        kinds = {file: schema.field(name).type for file, schema in schemas.items() if name in schema.names}
        columns = [pa.schema([(name, kind)]) for kind in kinds.values()]
        if len(kinds) < len(schemas):
            odd = next(file for file in schemas if file not in kinds)
            problem = f"{odd} has no column '{name}', other files have"
        else:
            try:
                fields.append(pa.unify_schemas(columns, promote_options="permissive").field(0))
                continue
            except pa.ArrowException:
                first, *others = kinds
                odd = next(file for file in others if kinds[file] != kinds[first])
                problem = f"column '{name}' is {kinds[odd]} in {odd} and {kinds[first]} in {first}"
        if named([*LABELS, *CAPTIONS], [name]) or name == caption_column or any(map(_holds_bytes, kinds.values())):
            raise UserError(f"{problem}: give all files the same columns.", key=str(odd), code="mismatch")
        notices.append(f"{problem}: it is not read.")
    metadata = next((schema.metadata for schema in schemas.values() if schema.metadata), None)
    return pa.schema(fields, metadata), notices


def _declared(schemas: Mapping[Path, pa.Schema]) -> dict[str, dict[str, Any]]:
    """What Hugging Face `datasets` wrote about each column into the schemas: `_type`, for classes also `names`.

    Raises:
        UserError: two files name the classes of one column differently.
    """
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file, schema in schemas.items():
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            declared = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
        except (KeyError, TypeError, AttributeError, ValueError):
            continue
        for name, feature in declared.items():
            first, earlier = found.setdefault(name, (file, feature))
            if earlier.get("names") != feature.get("names"):
                raise UserError(
                    f"{file} names the classes of column '{name}' otherwise than {first}: write both with one list.",
                    key=str(file),
                    code="mismatch",
                )
    return {name: feature for name, (_, feature) in found.items()}


def _distinct(tables: Iterable[pa.Table]) -> set[object]:
    """The values in the only column of some tables."""
    return {value for table in tables for value in table.column(0).unique().to_pylist()}


def open_arrow(path: Path, split: str, name: str, caption_column: str | None = None) -> Source:
    """What `datasets.save_to_disk` wrote (one data set or a dictionary of splits), memory-mapped.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be loaded as a saved data set: {reason}.", key=name, code="damaged") from error
    splits = data if isinstance(data, datasets.DatasetDict) else {}
    if splits:
        data = data[choose_split(split, tuple(data), path)]
    elif str(data.split) != split:
        refuse_split(split, path)
    declared = _declared({path / part: data.data.table.schema for part, data in (splits or {"": data}).items()})
    if data._indices is not None:  # rows were selected or shuffled before saving
        data = data.flatten_indices()

    def known(label: str) -> set[object]:
        return _distinct(part.data.table.select([label]) for part in splits.values() if label in part.column_names)

    table = data.data.table.cast(_plain_schema(data.data.table.schema))
    kind = "a data set saved by Hugging Face datasets"
    return _from_table(table, declared, name, kind, [(len(table), path)], caption_column, known)


def _from_table(
    table: pa.Table,
    declared: Mapping[str, Mapping[str, Any]],
    name: str,
    kind: str,
    folders: Folders,
    caption_column: str | None,
    known: Callable[[str], set[object]],
    notices: Sequence[str] = (),
) -> Source:
    """A table as a data set; `known` gives the classes that other splits have in a column."""
    pictures, several = _picture_columns(table, declared, name)
    if len(table) == 0:
        raise UserError(f"{name} has no rows.", key=name, code="missing")
    class_columns = [c for c in table.column_names if declared.get(c, {}).get("_type") == "ClassLabel"]
    class_columns += named(LABELS, [field.name for field in table.schema if _may_be_class(field.type)])
    texts = [field.name for field in table.schema if _is_text(field.type)]
    label = class_columns[0] if class_columns else None
    caption = choose_caption([c for c in texts if c != label], table.column_names, caption_column, name)
    labels, class_names = None, None
    if label is not None:
        declared_names = declared.get(label, {}).get("names")
        labels, class_names = class_numbers(
            _valid(table, label, name).to_pylist(),
            () if declared_names else known(label),
            f"column '{label}' of {name}",
            names=tuple(declared_names) if declared_names else None,
        )
    others = [c for c in table.column_names if c not in (pictures, *class_columns, *texts)]
    used = [f"images in '{pictures}'"]
    used += [f"{len(class_names)} classes in '{label}'"] if class_names else []
    used += [f"captions in '{caption}'"] if caption else []
    return Source(
        name=name,
        layout=f"{kind}: {len(table)} rows, {', '.join(used)}",
        pictures=TablePictures(table.column(pictures), Path(name).name, folders),
        labels=labels,
        captions=None if caption is None else Texts(_valid(table, caption, name)),
        class_names=class_names,
        notices=[*notices, *several, *left_out(others, label, caption, name)],
    )


def _valid(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    """A column whose texts are UTF-8.

    Raises:
        UserError: they are not.
    """
    try:
        table.column(column).validate(full=True)
    except pa.ArrowException as error:
        where = f"column '{column}' of {name}"
        raise UserError(f"{where} is damaged: {str(error).splitlines()[0]}.", key=where, code="damaged") from error
    return table.column(column)


def _picture_columns(table: pa.Table, declared: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, list[str]]:
    """The column of pictures: one declared so, else one in whose first cells pictures lie, else one that may hold them.

    Of several "image" or the first one is taken, with a notice.

    Raises:
        UserError: no column may hold encoded pictures.
    """
    encoded = [field.name for field in table.schema if _holds_bytes(field.type)]
    if not encoded:
        columns = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise UserError(
            f"{name} has no column of encoded images; its columns are: {columns}.", key=name, code="missing"
        )
    found = [column for column in encoded if declared.get(column, {}).get("_type") == "Image"]
    found = found or [column for column in encoded if _shows_pictures(table.column(column))]
    taken = [*named(["image"], found or encoded), *(found or encoded)][0]
    if len(found) < 2:
        return taken, []
    return taken, [f"{name} has {len(found)} columns of images ({', '.join(found)}): '{taken}' is taken."]


def may_hold_pictures(file: Path) -> bool:
    """Whether a parquet file is whole and has a column of bytes."""
    try:
        return any(_holds_bytes(_plain(field.type)) for field in pq.read_schema(file))
    except (pa.ArrowException, OSError):
        return False


def _shows_pictures(column: pa.ChunkedArray) -> bool:
    for cell in column.drop_null().slice(0, _CELLS_LOOKED_AT).to_pylist():
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        try:
            if data is None and suffix_of(str(path)) in IMAGE_SUFFIXES:
                return True
            Image.open(io.BytesIO(data or b"")).close()
            return True
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return False


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _may_be_class(kind: pa.DataType) -> bool:
    tests = pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_floating
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
