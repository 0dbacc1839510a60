"""Reads the numbers and strings of a GGUF header, and checks every length before it is used.

The header is read through a window of 1 MiB that slides over the file. Arrays, such as a vocabulary of six
megabytes, are checked and skipped; `LazyArray` reads one again when its items are asked for.
Sizes are Python integers, which do not overflow.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, NoReturn

from zimage_core.errors import BadFile, printable
from zimage_core.weights.source import AGAIN, Source

MAX_KEY = 65_535
MAX_STRING = 64 << 20
MAX_ITEMS = 16 << 20
MAX_ARRAYS = 1 << 16  # arrays inside arrays, in one file
MAX_NESTING = 8
MAX_HEADER = 256 << 20

_WINDOW = 1 << 20

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    BOOL: ("bool", "B"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
"""Number of a value type of GGUF -> its name and struct code."""
TYPE_NAMES = {**{number: name for number, (name, _) in SCALARS.items()}, STRING: "string", ARRAY: "array"}


class Cursor:
    """A position in the header of a file.

    Args:
        source: The file.
        order: Byte order, "<" or ">".
        position: Offset of the first byte to read.
        end: Offset after the last byte that may be read; None for the end of the file.
    """

    def __init__(self, source: Source, order: str, position: int = 0, end: int | None = None) -> None:
        self.source = source
        self.order = order
        self.position = position
        self.end = source.size if end is None else end
        self._window = bytearray()
        self._start = position  # file offset of the window
        self._u32 = Struct(order + "I").unpack_from
        self._u64 = Struct(order + "Q").unpack_from
        self._scalars = {number: Struct(order + code) for number, (_, code) in SCALARS.items()}
        self._arrays_left = MAX_ARRAYS

    def fail(self, fault: str) -> NoReturn:
        """BadFile with this fault."""
        raise BadFile(self.source.path, fault, AGAIN)

    def require_bytes(self, count: int, what: str) -> None:
        """Refuse a file that has fewer than `count` bytes left, before they are read or allocated."""
        left = self.end - self.position
        if count > left:
            self.fail(
                f"truncated or damaged header: {what} needs {count} bytes at byte {self.position}, "
                f"{left} remain of {self.end}"
            )
        if self.position + count > MAX_HEADER:
            self.fail(f"the header exceeds {MAX_HEADER} bytes at {what}; no known model needs that")

    def _at(self, count: int, what: str) -> int:
        """Load the next `count` bytes, advance past them and return their index in the window."""
        self.require_bytes(count, what)
        index = self.position - self._start
        if index + count > len(self._window):
            size = min(max(_WINDOW, count), self.end - self.position)
            self._window = self.source.read_at(self.position, size)
            self._start, index = self.position, 0
        self.position += count
        return index

    def u32(self, what: str) -> int:
        """Read four bytes as a number."""
        index = self._at(4, what)
        return int(self._u32(self._window, index)[0])

    def u64(self, what: str) -> int:
        """Read eight bytes as a number."""
        index = self._at(8, what)
        return int(self._u64(self._window, index)[0])

    def text(self, what: str, limit: int = MAX_STRING) -> str:
        """Read a length and that many bytes of UTF-8."""
        length = self.u64(f"the length of {what}")
        self.require_bytes(length, f"{what} (a string of {length} bytes)")
        if length > limit:
            self.fail(f"{what} is a string of {length} bytes, at most {limit} are allowed")
        index = self._at(length, what)
        try:
            return self._window[index : index + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8 text")

    def value(self, kind: int, key: str) -> Any:
        """Read one metadata value: int, float, bool, str or LazyArray."""
        if kind == STRING:
            return self.text(f"the value of {key}")
        if kind == ARRAY:
            return self.array(key)
        if kind not in self._scalars:
            self.fail(f"key {key} has the unknown value type {kind}")
        scalar = self._scalars[kind]
        index = self._at(scalar.size, f"the value of {key}")
        number = scalar.unpack_from(self._window, index)[0]
        if kind == BOOL:
            if number > 1:
                self.fail(f"key {key} is a bool of value {number}, 0 or 1 is allowed")
            return bool(number)
        return number

    def array(self, key: str, depth: int = 1) -> LazyArray:
        """Skip an array: every item is checked, none is kept."""
        if depth > MAX_NESTING:
            self.fail(f"key {key} nests arrays deeper than {MAX_NESTING}")
        kind = self.u32(f"the item type of array {key}")
        count = self.u64(f"the length of array {key}")
        start = self.position
        if kind in SCALARS:
            size = count * self._scalars[kind].size
        elif kind == STRING:
            size = count * 8
        elif kind == ARRAY:
            size = count * 12
        else:
            self.fail(f"array {key} has the unknown item type {kind}")
        self.require_bytes(size, f"array {key} of {count} items")
        if count > MAX_ITEMS:
            self.fail(f"array {key} has {count} items, at most {MAX_ITEMS} are allowed")
        if kind == STRING:
            self._skip_strings(count, key)
        elif kind == ARRAY:
            self._arrays_left -= count
            if self._arrays_left < 0:
                self.fail(f"array {key} and others nest more than {MAX_ARRAYS} arrays")
            for _ in range(count):
                self.array(key, depth + 1)
        else:
            self.position += size
        return LazyArray(self.source, self.order, key, kind, count, start, self.position)

    def _skip_strings(self, count: int, key: str) -> None:
        """Skip `count` strings at 0.1 us each, so that a GGUF with a vocabulary opens at once."""
        unpack = self._u64
        left = count
        while left:
            index = self._at(8, f"a string of array {key}")
            window, last = self._window, len(self._window) - 8
            length = 0
            while left and index <= last:
                length = unpack(window, index)[0]
                index += 8 + length
                left -= 1
            # a false length leads past the window and ends the inner loop: only the last one can be false
            self.position = self._start + index
            if self.position > self.end:
                self.position -= length
                self.require_bytes(length, f"a string of array {key}")
            if length > MAX_STRING:
                self.fail(f"array {key} holds a string of {length} bytes, at most {MAX_STRING} are allowed")


class LazyArray(Sequence[Any]):
    """An array of a GGUF header, read when its items are first asked for, then kept in memory.

    The file must still be open at that first access. Items are int, float, bool, str or LazyArray.
    """

    __slots__ = ("_count", "_end", "_items", "_key", "_kind", "_order", "_source", "_start")

    def __init__(
        self, source: Source, order: str, key: str, kind: int, count: int, start: int, end: int
    ) -> None:
        self._source, self._order, self._key, self._kind = source, order, key, kind
        self._count, self._start, self._end = count, start, end
        self._items: list[Any] | None = None

    @property
    def item_type(self) -> str:
        """GGUF's name of the items' type: "string", "i32", "array"..."""
        return TYPE_NAMES[self._kind]

    def tolist(self) -> list[Any]:
        """All items in a new list.

        Raises:
            BadFile: A string is not UTF-8, or the file was changed since it was opened.
        """
        return list(self._load())

    def _load(self) -> list[Any]:
        if self._items is None:
            if self._kind == STRING:
                self._items = self._strings()
            elif self._kind == ARRAY:
                cursor = Cursor(self._source, self._order, self._start, self._end)
                self._items = [cursor.array(self._key, 2) for _ in range(self._count)]
            else:
                self._items = self._numbers()
        return self._items

    def _numbers(self) -> list[Any]:
        numbers = array.array(SCALARS[self._kind][1])
        numbers.frombytes(self._source.read_at(self._start, self._end - self._start))
        if (self._order == "<") != (sys.byteorder == "little"):
            numbers.byteswap()
        return [number != 0 for number in numbers] if self._kind == BOOL else numbers.tolist()

    def _strings(self) -> list[str]:
        data = self._source.read_at(self._start, self._end - self._start)
        unpack = Struct(self._order + "Q").unpack_from
        items: list[str] = []
        index, size = 0, len(data)
        try:
            for _ in range(self._count):
                start = index + 8
                # the lengths were checked at opening, but the file may have been rewritten since
                if start > size or (index := start + unpack(data, index)[0]) > size:
                    fault = f"array {self._key} changed while the file was in use"
                    raise BadFile(self._source.path, fault, "load it again")
                items.append(data[start:index].decode("utf-8"))
        except UnicodeDecodeError:
            fault = f"item {len(items)} of array {self._key} is not UTF-8 text"
            raise BadFile(self._source.path, fault, AGAIN) from None
        return items

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._load()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._load())

    def __repr__(self) -> str:
        return f"LazyArray({printable(self._key)}: {self._count} x {self.item_type})"
