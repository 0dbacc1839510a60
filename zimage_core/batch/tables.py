"""Reads tables row by row: JSON lines, CSV, Parquet, and text with a prompt a line.

A row is read alone and its size is limited, so a table may be larger than memory. What is wrong with one row
is told of that row, and reading goes on behind it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from zimage_core.batch.columns import arguments
from zimage_core.errors import BadArgument, BadFile, printable
from zimage_core.files.untrusted import MAX_DIGITS, why_not_opened

MAX_ROW = 1 << 20
"""Most bytes of a row; a prompt has at most 16 KiB."""
JSON_LINES = (".jsonl", ".ndjson", ".json")
CSV = (".csv", ".tsv")
PARQUET = (".parquet", ".pq")
DELIMITERS = ",;\t"
FOREIGN = {
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\3\4": "a ZIP archive or a spreadsheet of Excel",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
"""First bytes -> what such a file is, where no row of it could be read."""
HINT = "unpack it, or save it as CSV in UTF-8"
PARQUET_ROWS = 256
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Raw:
    """One row as the table holds it.

    Args:
        number: Its number from 1: of the line in JSON lines and text, else of the row behind the header.
        cells: Column -> value, without empty cells.
        fault: What is wrong with the row as a whole; "" if nothing is.
        text: Whether numbers are text, as in CSV.
    """

    number: int
    cells: Mapping[str, Any]
    fault: str = ""
    text: bool = False


def read_table(source: str | Path, keep: Collection[str] = ()) -> Iterator[Raw]:
    """Rows of a file; "-" is standard input, as JSON lines or as text.

    The kind is told by the name's ending, else by the first bytes.

    Args:
        source: The file.
        keep: Columns that are no arguments.

    Raises:
        BadFile: The file cannot be read, or is no such table; raised before the first row, or where a row is
            larger than `MAX_ROW`.
        Unsupported: Parquet without the package pyarrow.
    """
    if str(source) == "-":
        yield from _lines_or_json("standard input", sys.stdin.buffer)
        return
    path = Path(source)
    try:
        if path.is_fifo():  # such as the <(...) of a shell
            with path.open("rb") as file:
                yield from _lines_or_json(path, file)
            return
        if not path.is_file():
            fault = "is a folder or a device" if path.exists() else "there is no such file"
            raise BadFile(path, fault, "give a table: .jsonl, .csv, .parquet or .txt")
        with path.open("rb") as file:
            head = file.peek(4)[:4]
            if not head:
                raise BadFile(path, "the file is empty, rows were expected")
            if found := next((what for begin, what in FOREIGN.items() if head.startswith(begin)), None):
                raise BadFile(path, f"is {found}, a table as text or Parquet was expected", HINT)
            ending = path.suffix.lower()
            if ending in PARQUET or head == b"PAR1":
                yield from _parquet(path, keep)
            elif ending in CSV:
                yield from _csv(path, file, keep)
            elif ending in JSON_LINES:
                yield from _json_lines(path, _lines(path, file))
            else:
                yield from _lines_or_json(path, file)
    except OSError as error:
        reason, hint = why_not_opened(path, error)
        raise BadFile(path, f"cannot be read: {reason}", hint) from None
    except ValueError as error:
        if isinstance(error, BadArgument):
            raise
        raise BadFile(path, "the path holds a NUL character") from None


def _lines(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without the byte order mark."""
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise BadFile(path, f"line {number} has more than {MAX_ROW} bytes, no row has", "is it a table?")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decoded(line: bytes) -> str | None:
    """The text of a line; None if it is not UTF-8 or holds NUL."""
    try:
        return None if b"\0" in line else line.decode()
    except UnicodeDecodeError:
        return None


NOT_TEXT = "is not text in UTF-8 (or holds NUL bytes, as UTF-16 does); save the table as UTF-8"


def _lines_or_json(path: str | Path, file: BinaryIO) -> Iterator[Raw]:
    lines = _lines(path, file)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    lines = chain((first,), lines)
    if first[1].lstrip().startswith(b"{"):
        yield from _json_lines(path, lines)
        return
    for number, line in lines:
        text = _decoded(line)
        if text is None:
            yield Raw(number, {}, NOT_TEXT)
        elif prompt := text.strip():
            yield Raw(number, {"prompt": prompt})


# --- JSON lines ---


def _json_lines(path: str | Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[Raw]:
    for number, line in lines:
        text = _decoded(line)
        if text is None:
            yield Raw(number, {}, NOT_TEXT)
        elif not text.strip():
            continue
        elif number == 1 and text.lstrip().startswith("["):
            hint = "write one object a line, as `jq -c '.[]'` does"
            raise BadFile(path, "begins with a JSON array, an object a line was expected", hint)
        else:
            yield _object(number, text)


def _object(number: int, text: str) -> Raw:
    def fail(fault: str) -> NoReturn:
        raise BadArgument(fault)

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= MAX_DIGITS else fail(f"holds a number of {len(digits)} digits")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            fail(f"has the key {printable(twice, 60)!r} twice")
        return table

    try:
        value = json.loads(
            text,
            parse_int=integer,
            parse_constant=lambda name: fail(f"holds {name}, which is no number"),
            object_pairs_hook=unique,
        )
    except BadArgument as error:
        return Raw(number, {}, str(error))
    except json.JSONDecodeError as error:
        return Raw(number, {}, f"is not valid JSON: {error.msg} at character {error.colno}")
    except RecursionError:
        return Raw(number, {}, "is JSON nested too deep")
    if not isinstance(value, dict):
        return Raw(number, {}, f"a JSON object was expected, found {type(value).__name__}")
    return Raw(number, {key: each for key, each in value.items() if each is not None})


# --- CSV ---


def _csv(path: Path, file: BinaryIO, keep: Collection[str]) -> Iterator[Raw]:
    # a byte that is no UTF-8 becomes a surrogate, so that the fault is told of its row
    texts = (line.decode("utf-8", "surrogateescape") for _, line in _lines(path, file))
    first = next(texts)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=first.count)
    records = csv.reader(chain((first,), texts), delimiter=delimiter, strict=True)
    header = _next(records)
    if isinstance(header, str) or not header:
        raise BadFile(path, f"has no header: {header or 'the first row is empty'}", "name the columns in it")
    names = [name.strip() for name in header]
    _check_header(path, names, keep)
    number = 0
    while (record := _next(records)) is not None:
        if not record:
            continue
        number += 1
        if isinstance(record, str):
            yield Raw(number, {}, record)
        elif len(record) != len(names):
            yield Raw(number, {}, f"has {len(record)} cells, the header names {len(names)}")
        elif any(map(_is_damaged, record)):
            yield Raw(number, {}, NOT_TEXT)
        else:
            cells = {name: cell for name, cell in zip(names, record, strict=True) if cell.strip()}
            yield Raw(number, cells, text=True)


def _next(records: Iterator[list[str]]) -> list[str] | str | None:
    """The next record, what is wrong with it, or None at the end."""
    try:
        return next(records, None)
    except csv.Error as error:
        return f"is no valid CSV ({printable(error, 100)})"


def _is_damaged(cell: str) -> bool:
    return "\0" in cell or (not cell.isascii() and any("\ud800" <= c <= "\udfff" for c in cell))


def _check_header(path: Path, names: list[str], keep: Collection[str]) -> None:
    if any(map(_is_damaged, names)):
        raise BadFile(path, f"its header {NOT_TEXT}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BadFile(path, f"has the column {printable(twice[0], 60)!r} twice", "rename one of them")
    try:
        arguments(names, keep)
    except BadArgument as error:
        raise BadFile(path, str(error)) from None


# --- Parquet ---


def _parquet(path: Path, keep: Collection[str]) -> Iterator[Raw]:
    parquet = import_parquet()
    call = _quiet(path)
    file = call(lambda: parquet.ParquetFile(path))
    names = list(file.schema_arrow.names)
    _check_header(path, names, keep)
    batches = file.iter_batches(batch_size=PARQUET_ROWS)
    number = 0
    while (batch := call(lambda: next(batches, None))) is not None:
        for cells in call(batch.to_pylist):
            number += 1
            yield Raw(number, {name: value for name, value in cells.items() if value is not None})


def import_parquet() -> Any:
    """The module pyarrow.parquet.

    Raises:
        Unsupported: The package is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        from zimage_core.errors import Unsupported

        raise Unsupported("Parquet needs the package pyarrow: pip install 'zimage-core[parquet]'") from None
    return parquet


def _quiet(path: Path) -> Callable[[Callable[[], Any]], Any]:
    """A caller of pyarrow whose errors are one sentence."""

    def call(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  damaged files make it raise nearly anything
            reason = printable(str(error).partition("\n")[0], 120)
            raise BadFile(path, f"is no sound Parquet file ({reason})", "write it again") from None

    return call


def given_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Raw]:
    """Rows of an iterable of dicts."""
    for number, row in enumerate(rows, 1):
        if not _is_row(row):
            yield Raw(number, {}, f"a dict of arguments was expected, got a {type(row).__name__}")
        else:
            yield Raw(number, {key: value for key, value in row.items() if value is not None})


def _is_row(row: object) -> bool:
    return isinstance(row, Mapping) and all(isinstance(key, str) for key in row)
