"""Computes the layout of a new GGUF file (version 3): its header and the offset of each tensor's data.

Source: ggml/docs/gguf.md. The reader is weights/gguf.py; weights/cursor.py has the value types for both.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.formats import BlockFormat
from zimage_core.weights.cursor import ARRAY, SCALARS, STRING, TYPE_NAMES, Cursor
from zimage_core.weights.gguf import GGUFFile

ALIGNMENT = 32
VERSION = 3
QUANTIZATION_VERSION = 2
"""`general.quantization_version` of ggml's block layouts since 2023."""

_NUMBERS = {name: number for number, name in TYPE_NAMES.items()}
_CODES = dict(SCALARS.values())
_FIRST_KEY = 24  # magic, version, two counts


@dataclass(frozen=True)
class RawValue:
    """A metadata value in the encoding of a GGUF file: its type number, then its bytes."""

    data: bytes


class TypedArray(list[Any]):
    """A list with an explicit GGUF item type, which Python's ints or an empty list cannot show.

    Args:
        items: The values.
        item_type: GGUF's name of their type: "string", "i32", "f64"...
    """

    def __init__(self, items: Iterable[Any], item_type: str) -> None:
        super().__init__(items)
        self.item_type = item_type


@dataclass(frozen=True)
class Layout:
    """Plan of a file: its header and the position of each tensor.

    Args:
        header: Everything before the tensors' data.
        places: Tensor -> (offset from the start of the file, bytes).
        nbytes: Size of the whole file.
    """

    header: bytes
    places: dict[str, tuple[int, int]]
    nbytes: int


def lay_out(
    metadata: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], BlockFormat]]
) -> Layout:
    """Lay out a GGUF file.

    Args:
        metadata: Key -> bool, int (u32, or i32 or u64 where it does not fit), float (f32), str, `RawValue`,
            or a sequence of one of these kinds. Values of another GGUF keep their types through `raw_keys`.
        tensors: Name, shape in PyTorch's order, and format of each.

    Raises:
        Unsupported: A format without GGUF type number, or more than four dimensions.
        BadArgument: A value that no GGUF type holds.
    """
    head, table, places = bytearray(), bytearray(), {}
    for key, value in metadata.items():
        head += _text(key) + _value(key, value)
    offset = 0
    rows = list(tensors)
    for name, shape, fmt in rows:
        if fmt.ggml_type is None or len(shape) > 4:
            raise Unsupported(f"{printable(name, 120)}: GGUF has no place for {fmt.name} of shape {shape}")
        nbytes = math.prod(shape[:-1]) * fmt.row_bytes(shape[-1] if shape else 1)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table += _text(name) + dims + struct.pack("<IQ", fmt.ggml_type, offset)
        places[name] = (offset, nbytes)
        offset = -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
    counts = struct.pack("<4sIQQ", b"GGUF", VERSION, len(rows), len(metadata))
    start = len(counts) + len(head) + len(table)
    padding = -start % ALIGNMENT
    header = counts + bytes(head) + bytes(table) + bytes(padding)
    return Layout(
        header, {name: (len(header) + at, size) for name, (at, size) in places.items()}, len(header) + offset
    )


def raw_keys(file: GGUFFile) -> dict[str, Any]:
    """All metadata of a GGUF file with its exact types; plain values where the file is big-endian.

    Raises:
        BadFile: The file changed since it was opened.
    """
    if file.swapped:
        return dict(file.metadata)
    found: dict[str, Any] = {}
    cursor = Cursor(file.source, "<", _FIRST_KEY)
    for _ in file.metadata:
        key = cursor.text("a metadata key")
        start = cursor.position
        cursor.value(cursor.u32("a value type"), printable(key, 60))  # skips the value
        found[key] = RawValue(bytes(file.source.read_at(start, cursor.position - start)))
    return found


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(value: object) -> str:
    """GGUF's name of the type that a plain value is written as."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        for name, low, high in (("u32", 0, 1 << 32), ("i32", -(1 << 31), 0), ("u64", 0, 1 << 64)):
            if low <= value < high:
                return name
    if isinstance(value, float):
        return "f32"
    if isinstance(value, str):
        return "string"
    raise BadArgument(f"GGUF has no type for the metadata value {printable(value, 60)}")


def _plain(kind: str, value: Any) -> bytes:
    return _text(value) if kind == TYPE_NAMES[STRING] else struct.pack("<" + _CODES[kind], value)


def _value(key: str, value: Any) -> bytes:
    """Type number and bytes of a value."""
    if isinstance(value, RawValue):
        return value.data
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = list(value)
        stated = getattr(value, "item_type", "")  # only LazyArray and TypedArray have this attribute
        if stated and stated != TYPE_NAMES[ARRAY]:
            kind = stated
        else:
            kinds = {_kind(item) for item in items}
            if kinds == {"u32", "i32"}:
                kinds = {"i32"}
            if len(kinds) > 1:
                raise BadArgument(f"the metadata array {printable(key, 60)} holds values of several types")
            kind = next(iter(kinds), "u32")
        body = b"".join(_plain(kind, item) for item in items)
        return struct.pack("<IIQ", ARRAY, _NUMBERS[kind], len(items)) + body
    kind = _kind(value)
    return struct.pack("<I", _NUMBERS[kind]) + _plain(kind, value)
