"""Documents in files: whole texts, and one column of a table, a row at a time; other columns are never looked at.

.jsonl .ndjson .jsonlines .json   an object a line (also .ldjson, and .jl unless it is Julia); or one list of objects, or
                                  one object of lists that are columns, which is read whole
.csv .tsv                         comma- and tab-separated, quoted as RFC 4180 says, the first line names the columns
.parquet                          columns of text, or of bytes that are UTF-8
everything else                   text, one document a file

Each of them also as .gz, .xz, .bz2 and .zst. Tables of other kinds, archives, and tables under another name, such as
`rows.jsonl.bak` or `rows.csv~`, are refused by their names.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from mla.errors import UserError

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".json"), "json"),
    **{".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"},
}
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_OTHER_TABLES = {
    *(".arrow", ".avro", ".db", ".dta", ".feather", ".h5", ".hdf5", ".ipc", ".msgpack", ".npy", ".npz", ".ods", ".orc"),
    *(".pickle", ".pkl", ".psv", ".sas7bdat", ".sav", ".sqlite", ".sqlite3", ".tab", ".tfrecord"),
    *(".xls", ".xlsb", ".xlsm", ".xlsx"),
}
_ARCHIVES = {".7z", ".br", ".lz4", ".lzma", ".rar", ".tar", ".tbz2", ".tgz", ".txz", ".z", ".zip"}
SUFFIXES = {*KINDS, *COMPRESSED, ".txt", ".xlsx", ".tar", ".tgz", ".zip"}  # that no dataset on the hub is named with

_BOM = b"\xef\xbb\xbf"
_DEEPEST = 64  # levels of JSON that are looked at: the text lies in the first three
_ROWS = 256  # of a parquet file, read at a time
_LONGEST = 1 << 30  # characters of a field; an unclosed quotation mark would otherwise read the rest of a file as one field


def kind(path: Path) -> str:
    """json, csv, tsv, parquet or text, by the name of a file.

    Raises:
        UserError: it is a table or an archive of a kind that is not read, or named so that it may be a table.
    """
    suffix = _suffix(path)
    if suffix in _OTHER_TABLES:
        raise UserError(f"config.data.corpus: {path}: {suffix} tables are not read; write it as .jsonl, .csv or .parquet")
    if suffix in _ARCHIVES:
        raise UserError(f"config.data.corpus: {path}: {suffix} files are not read; unpack it and name the folder")
    if suffix == ".jl":  # lines of JSON, or Julia, in which no program begins with a brace
        return "json" if _peeked(path).startswith(b"{") else "text"
    within = [match[0].lower() for match in re.finditer(r"\.\w+", path.name) if match[0].lower() in KINDS]
    if within and suffix not in KINDS:
        table = within[-1]
        renamed = f"let its name end in {table}, or {table}.gz if it is packed, or have no {table} in it if it is none"
        raise UserError(f"config.data.corpus: {path}: may be a {table} table; {renamed}")
    return KINDS.get(suffix, "text")


def documents(path: Path, text_field: str) -> Iterator[bytes]:
    """The documents of a file in order, as UTF-8, without empty ones; a lone surrogate in JSON becomes U+FFFD.

    Args:
        path: see the top of this file.
        text_field: the column that holds the text of a table.

    Raises:
        UserError: the file cannot be read (with the line, where it has lines), has no such column in any row, or the
            column holds something else than text.
    """
    readers = {"json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet, "text": _text}
    try:
        yield from filter(None, readers[kind(path)](path, text_field))
    except UserError:
        raise
    except Exception as error:  # each format and each compression raises its own kinds
        raise unreadable(path, error) from error


def unreadable(where: object, error: Exception) -> UserError:
    """The refusal of a file, or of a line of it."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"config.data.corpus: {where} cannot be read ({' '.join(reason.split())[:300]})")


def no_column(text_field: str, name: object, columns: list[str]) -> UserError:
    """The refusal of a table that lacks the column."""
    has = ", ".join(map(repr, columns[:20])) or "none"
    return UserError(
        f"config.data.text_field: {name} has no column {text_field!r}; it has {has}: name the one that holds the text"
    )


def no_text(text_field: str, where: object, holds: object) -> UserError:
    """The refusal of a column, or of a value in it, that is not text."""
    return UserError(f"config.data.text_field: column {text_field!r} of {where} holds {str(holds)[:100]}, not text")


def _suffix(path: Path) -> str:
    """The last part of a name that says what is in the file, in small letters, under a compression or not."""
    parts = [suffix.lower() for suffix in path.suffixes]
    if parts and parts[-1] in COMPRESSED:
        parts.pop()
    return parts[-1] if parts else ""


def _opened(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path))
        case ".xz":
            return lzma.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def has_mark(path: Path) -> bool:
    """Whether a file, unpacked, begins with a byte order mark. Raises UserError."""
    return _peeked(path, leave_out=b"").startswith(_BOM)


def _peeked(path: Path, leave_out: bytes = _BOM + b" \t\r\n") -> bytes:
    """The start of a file, unpacked, without the bytes to be left out of it. Raises UserError."""
    try:
        with _opened(path) as file:
            return file.read(1 << 10).lstrip(leave_out)
    except Exception as error:  # each compression raises its own kinds
        raise unreadable(path, error) from error


def _first_line(path: Path) -> bytes:
    """The first line that is not blank, without space and a byte order mark before it."""
    with _opened(path) as file:
        return next((line for line in file if line.strip(_BOM + b" \t\r\n")), b"").lstrip(_BOM).lstrip()


def _text(path: Path, _: str) -> Iterator[bytes]:
    with _opened(path) as file:
        content = file.read().removeprefix(_BOM)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"config.data.corpus: {path} is not UTF-8 text ({error}); convert it or leave it out") from error
    yield content


# -------------------------------------------------------------------------------------------------------------------- JSON


def _json(path: Path, text_field: str) -> Iterator[bytes]:
    columns: dict[str, None] = {}  # seen so far, while none of the rows has the column
    missing = True
    for where, row in _whole(path, text_field) if _is_whole(path, text_field) else _lines(path):
        if not isinstance(row, dict):
            raise UserError(f"config.data.corpus: {path}, {where} is no object with columns")
        if missing:
            missing = text_field not in row
            columns.update(dict.fromkeys(row))
        value = row.get(text_field)
        if isinstance(value, str):
            yield re.sub("[\ud800-\udfff]", "\ufffd", value).encode()
        elif value is not None:
            raise no_text(text_field, f"{path}, {where}", _json_type(value))
    if missing and columns:
        raise no_column(text_field, path, list(columns))


def _is_whole(path: Path, text_field: str) -> bool:
    """Whether a file is one JSON value, and not one a line."""
    start = _first_line(path)
    if start.startswith(b"["):
        return True
    try:
        first = _parsed(start or b"{}")
    except (ValueError, RecursionError):
        return _suffix(path) == ".json"  # an object in several lines
    if _suffix(path) != ".json" or not isinstance(first, dict) or not isinstance(first.get(text_field), list):
        return False
    with _opened(path) as file:  # columns in one line, unless there are more lines
        return sum(1 for line in file if line.strip(_BOM + b" \t\r\n")) == 1


def _parsed(text: str | bytes) -> Any:
    """The value of a JSON text. Whole numbers are read as 0, and what is nested too deeply to be read as null.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply and not closed.
    """
    try:
        return json.loads(text, parse_int=lambda _: 0)  # Python refuses numbers of thousands of digits
    except RecursionError:
        return json.loads(_shallow(text if isinstance(text, str) else text.decode()), parse_int=lambda _: 0)


def _shallow(text: str) -> str:
    """A JSON text with null for every list and object that is nested deeper than `_DEEPEST`."""
    depth, start, kept = 0, 0, []
    for token in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', text):
        if token[0] in "[{":
            depth += 1
            if depth == _DEEPEST + 1:
                kept += [text[start : token.start()], "null"]
        elif token[0] in "]}":
            if depth == _DEEPEST + 1:
                start = token.end()
            depth -= 1
    if depth:
        raise RecursionError("maximum recursion depth exceeded, in brackets that are not closed")
    return "".join([*kept, text[start:]])


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not blank."""
    for number, line in _decoded(path):
        if line.strip():
            try:
                yield f"line {number}", _parsed(line)
            except (ValueError, RecursionError) as error:
                raise unreadable(f"{path}, line {number}", error) from error


def _whole(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a list of rows, of one row, or of lists that are columns."""
    with _opened(path) as file:
        value = _parsed(file.read().removeprefix(_BOM))
    if isinstance(value, dict) and isinstance(value.get(text_field), list):
        value = [{text_field: text} for text in value[text_field]]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"row {number}", row


def _json_type(value: Any) -> str:
    names = {bool: "bool", int: "int64", float: "double", list: "a list", dict: "an object"}
    return names[type(value)]


# --------------------------------------------------------------------------------------------------------- CSV and parquet


def _csv(path: Path, text_field: str) -> Iterator[bytes]:
    csv.field_size_limit(_LONGEST)
    delimiter = "\t" if kind(path) == "tsv" else ","
    reader = csv.reader((line for _, line in _decoded(path)), delimiter=delimiter, strict=True)
    try:
        columns = next(filter(None, reader), None)
        if columns is None:
            return
        if text_field not in columns:
            raise no_column(text_field, path, columns)
        _require_one(text_field, path, columns)
        at = columns.index(text_field)
        for row in filter(None, reader):
            if len(row) > len(columns) or len(row) <= at:
                why = f"quote fields that hold {delimiter!r}" if len(row) > at else f"column {text_field!r} is missing"
                raise ValueError(f"{len(row)} fields under {len(columns)} column names; {why}")
            yield row[at].encode()
    except (csv.Error, ValueError) as error:
        raise unreadable(f"{path}, line {reader.line_num}", error) from error


def _require_one(text_field: str, path: Path, columns: list[str]) -> None:
    """Refuses a table in which several columns have the name of the one that holds the text."""
    if (count := columns.count(text_field)) > 1:
        raise UserError(f"config.data.text_field: {path} has {count} columns {text_field!r}; rename all but one of them")


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a file of UTF-8, line ends included and a byte order mark left out."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.removeprefix(_BOM).decode() if number == 1 else line.decode()
            except UnicodeDecodeError as error:
                raise unreadable(f"{path}, line {number}", error) from error


def _parquet(path: Path, text_field: str) -> Iterator[bytes]:
    if not path.stat().st_size:
        return
    with _opened(path) as file, tempfile.TemporaryFile() as unpacked:
        if path.suffix.lower() in COMPRESSED:  # its reader goes back and forth
            shutil.copyfileobj(file, unpacked)
        yield from _parquet_rows(path, unpacked if unpacked.tell() else file, text_field)


def _parquet_rows(path: Path, file: IO[bytes], text_field: str) -> Iterator[bytes]:
    from pyarrow import parquet

    rows = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    if text_field not in rows.schema_arrow.names:
        raise no_column(text_field, path, rows.schema_arrow.names)
    _require_one(text_field, path, rows.schema_arrow.names)
    held = rows.schema_arrow.field(text_field).type
    if not is_text(held):
        raise no_text(text_field, path, held)
    values = (value for batch in rows.iter_batches(_ROWS, columns=[text_field]) for value in batch.column(0))
    for number, value in enumerate(values, 1):
        try:
            yield utf8(value.as_py())
        except UnicodeDecodeError as error:
            raise unreadable(f"{path}, row {number}", error) from error


def is_text(held: Any) -> bool:
    """Whether an Arrow type holds text, or bytes that may be text, or nothing at all."""
    from pyarrow import types

    if types.is_dictionary(held):
        return is_text(held.value_type)
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary", "null")
    return any(getattr(types, f"is_{kind}")(held) for kind in kinds)


def utf8(value: str | bytes | None) -> bytes:
    """A value of such a column as UTF-8. Raises UnicodeDecodeError."""
    return (value.decode() if isinstance(value, bytes) else value or "").encode()
