"""Metadata files as rows: JSON lines, CSV, parquet, EDM's dataset.json, and the JSON file of one picture."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from carrara.data.columns import LABELS, named, numbers_or_names
from carrara.data.decode import UnreadablePicture
from carrara.data.trees import Tree
from carrara.errors import UserError

Row = dict[str, object]


def read_text(tree: Tree, name: str) -> str:
    """A file of a tree as text.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    where = tree.where(name)
    try:
        return tree.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: save it as UTF-8.", key=where, code="damaged") from error
    except UnreadablePicture as error:
        raise UserError(f"{where} cannot be read: {error}.", key=where, code="damaged") from error


def rows_of(tree: Tree, file: str) -> list[Row]:
    """The rows of a metadata file, at least one.

    Raises:
        UserError: it cannot be read, has no rows, or a row is malformed; the first such row is named.
    """
    where = tree.where(file)
    if file.endswith(".parquet"):
        rows = _parquet_rows(tree, file, where)
    elif file.endswith("dataset.json"):
        rows = edm_rows(read_text(tree, file), where)
    elif file.endswith(".csv"):
        rows = _csv_rows(read_text(tree, file), where)
    else:
        lines = enumerate(re.split(r"\r\n|\n|\r", read_text(tree, file)), 1)  # splitlines() would split captions
        rows = [_json_row(line, f"{where} line {number}", where) for number, line in lines if line.strip()]
    if not rows:
        raise UserError(
            f"{where} has no rows: write one for each image, or remove the file.", key=where, code="missing"
        )
    return rows


def parse_json(text: str, where: str, key: str) -> object:
    """A JSON value.

    Args:
        where: the file or line, for messages.
        key: the file.

    Raises:
        UserError: the text is no JSON, nested too deeply, or has a key twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> Row:
        double = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if double:
            raise UserError(f"{where} has the key '{double[0]}' twice: keep one.", key=key, code="conflict")
        return dict(pairs)

    try:
        data: object = json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise UserError(f"{where} is no JSON: {error}.", key=key, code="damaged") from error
    return data


def _json_row(line: str, where: str, key: str) -> Row:
    row = parse_json(line, where, key)
    if not isinstance(row, dict):
        raise UserError(f'{where} is no JSON object of the form {{"file_name": …}}.', key=key, code="damaged")
    return row


def edm_rows(text: str, where: str) -> list[Row]:
    """{"labels": [["00000/img.png", 6], …]}, the description in the data set zips of EDM and StyleGAN.

    Raises:
        UserError: the text is of another form.
    """
    data = parse_json(text, where, where)
    try:
        return [{"file_name": name, "label": label} for name, label in data["labels"] or []]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        form = '{"labels": [["NAME.png", 0], …]}'
        raise UserError(f"{where} is not of the form {form}.", key=where, code="damaged") from error


def _parquet_rows(tree: Tree, file: str, where: str) -> list[Row]:
    try:
        rows: list[Row] = pq.read_table(io.BytesIO(tree.read(file))).to_pylist()
    except (pa.ArrowException, UnreadablePicture, ValueError) as error:  # ValueError: text that is no UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} cannot be read as parquet: {reason}.", key=where, code="damaged") from error
    return rows


def _csv_rows(text: str, where: str) -> list[Row]:
    """Rows of texts; a label column of numbers becomes numbers, as it would be in JSON."""
    csv.field_size_limit(2**31 - 1)  # captions may be longer than the 128 KiB of the default
    reader = csv.reader(io.StringIO(text, newline=None), strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        lines += ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num}: {error}.", key=where, code="damaged") from error
    columns = lines[0][1] if lines else []
    double = [column for column, count in Counter(columns).items() if count > 1 and column]
    if double:
        raise UserError(f"{where} has several columns '{double[0]}': rename one.", key=where, code="conflict")
    for number, cells in lines:
        if any(cells[len(columns) :]):
            raise UserError(
                f"{where} line {number} has {len(cells)} cells, the header {len(columns)}: put captions with commas "
                "into quotes.",
                key=where,
                code="shape",
            )
    rows: list[Row] = [dict(zip(columns, cells, strict=False)) for _, cells in lines[1:]]
    for column in named(LABELS, columns):
        for row, value in zip(rows, numbers_or_names([str(row.get(column, "")) for row in rows]), strict=True):
            row[column] = value
    return rows
