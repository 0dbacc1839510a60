"""Rows of a table as checked calls with keys, before a model is loaded.

The key of a row is a hash of all that decides its image: the arguments, the contents of the images that it
names, its adapters, and, added by `sealed`, the model's files and how it computes. A row that was done is
known by its key, wherever it stands in the table; a model or an image that was changed makes another key.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from zimage_core.batch.columns import FILE, FILES, KINDS, LORA, arguments, read_cell
from zimage_core.batch.model import hash_of
from zimage_core.batch.tables import Raw
from zimage_core.batch.worker import Row
from zimage_core.editing.edit import STRENGTH
from zimage_core.editing.images import probe
from zimage_core.errors import BadArgument, ZImageError
from zimage_core.run.beforehand import check_call
from zimage_core.run.request import Limits, Request

MAX_ROWS = 5_000_000
"""Most rows of a table; each takes about a kilobyte of memory."""
MAX_LISTED = 1000
"""Most bad rows that are described; the others are counted."""
DEFAULTS = {each.name: each.default for each in fields(Request)}


@dataclass
class Faults:
    """Rows that cannot be drawn.

    Args:
        listed: Number and reason of the first ones.
        count: How many there are.
    """

    listed: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0

    def add(self, number: int, reason: str) -> None:
        """Count a row, and keep its reason as long as there are few."""
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append((number, reason))


@dataclass(frozen=True)
class Context:
    """What rows are checked and named by.

    Args:
        limits: Limits of the model.
        extras: Argument -> identity of files that only rows with this argument use, such as ControlNets; or a
            sentence that says why this model cannot take the argument.
        defaults: Arguments for rows that do not give them.
        folder: What paths are relative to.
        keep: Columns that go into the index as they are.
    """

    limits: Limits
    extras: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)
    keep: Collection[str] = ()


def read_rows(raws: Iterable[Raw], context: Context) -> tuple[list[Row], Faults]:
    """Check every row.

    Args:
        raws: The rows as the table holds them.
        context: What they are checked by.

    Returns:
        The good rows in the table's order, and the bad ones. The keys lack the model.

    Raises:
        BadArgument: There are more rows than `MAX_ROWS`.
        BadFile: The table cannot be read.
    """
    reader, rows, faults = _Reader(context), [], Faults()
    for raw in raws:
        try:
            rows.append(reader.read(raw))
        except (ZImageError, OSError) as error:
            faults.add(raw.number, str(error))
        if len(rows) + faults.count > MAX_ROWS:
            raise BadArgument(f"the table has more than {MAX_ROWS} rows; split it")
    return rows, faults


class _Reader:
    """Reads rows one by one; what several rows share, such as hashes of files, is kept."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._seen: Counter[bytes] = Counter()
        self._hashes: dict[tuple[str, str], str | ZImageError] = {}
        self._columns: dict[tuple[str, ...], dict[str, str]] = {}

    def read(self, raw: Raw) -> Row:
        """One row, checked.

        Raises:
            BadArgument, BadFile: It cannot be drawn.
        """
        if raw.fault:
            raise BadArgument(raw.fault)
        own, loras = self._own(raw)
        call = self._with_defaults(own)
        check_call(call, self._context.limits)
        if "seed" not in call:
            content = {"call": {**own, **self._files(own)}, "loras": self._adapters(loras)}
            call["seed"] = self._seed(_json(content))
        decisive = {name: value for name, value in call.items() if value != DEFAULTS[name]}
        extras = {name: each for name, each in self._context.extras.items() if name in call}
        for each in extras.values():
            if isinstance(each, str):
                raise BadArgument(each)
        parts = ({**decisive, **self._files(call)}, self._adapters(loras), extras)
        key = hashlib.sha256(_json(parts)).hexdigest()
        kept = {name: _plain(raw.cells[name]) for name in self._context.keep if name in raw.cells}
        return Row(raw.number, key, call, loras, kept)

    def _own(self, raw: Raw) -> tuple[dict[str, Any], tuple[tuple[str, float], ...]]:
        """The arguments that the row itself gives, and its adapters."""
        names = tuple(raw.cells)
        columns = self._columns.get(names)
        if columns is None:
            columns = arguments(names, self._context.keep)
            if len(self._columns) < 1000:
                self._columns[names] = columns
        folder = self._context.folder
        cells = {
            name: read_cell(name, raw.cells[column], raw.text, folder) for column, name in columns.items()
        }
        loras = cells.pop(LORA, ())
        if "prompt" not in cells:
            raise BadArgument("prompt: it is missing or empty")
        return cells, loras

    def _with_defaults(self, own: dict[str, Any]) -> dict[str, Any]:
        usual = dict(self._context.defaults)
        for name, other in (("cfg", "guidance_scale"), ("guidance_scale", "cfg"), ("sigmas", "schedule")):
            if name in own:
                usual.pop(other, None)
        call = {**usual, **own}
        if "image" in call and not {"strength", "mask_image", "outpaint"} & call.keys():
            call["strength"] = STRENGTH  # the image is what the run begins from, also beside a vision tower
        return call

    def _seed(self, content: bytes) -> int:
        """A seed for a row without one: by its content, and by how many equal rows came before it."""
        digest = hashlib.sha256(content).digest()[:16]
        self._seen[digest] += 1
        return int.from_bytes(hashlib.sha256(digest + b"%d" % self._seen[digest]).digest()[:4], "big")

    def _files(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Hashes of the images of a call, in place of their paths."""
        found: dict[str, Any] = {}
        for name, value in call.items():
            if KINDS[name] == FILE:
                found[name] = self._hash(name, value)
            elif KINDS[name] == FILES:
                found[name] = [self._hash(name, each) for each in value]
        return found

    def _adapters(self, loras: Iterable[tuple[str, float]]) -> list[Any]:
        return [[self._hash(LORA, path), weight] for path, weight in loras]

    def _hash(self, name: str, path: str) -> str:
        found = self._hashes.get((name, path))
        if found is None:
            try:
                found = str(hash_of(path)) if name == LORA else probe(path, name)
            except ZImageError as error:
                found = error
            self._hashes[name, path] = found
        if isinstance(found, ZImageError):
            raise found
        return found


def sealed(rows: Iterable[Row], identity: Mapping[str, Any]) -> list[Row]:
    """The rows with their final keys.

    Args:
        rows: Rows of `read_rows`.
        identity: What tells the model and its arithmetic from others.
    """
    model = hashlib.sha256(_json(identity))

    def key(row: Row) -> str:
        found = model.copy()
        found.update(row.key.encode())
        return found.hexdigest()

    return [replace(row, key=key(row)) for row in rows]


def _json(value: Any) -> bytes:
    """Text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str).encode()


def _plain(value: Any) -> Any:
    """A value of a kept column as JSON can hold it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value
