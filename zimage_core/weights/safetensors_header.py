"""Strict parser of the JSON in front of a safetensors file.

It knows this one structure and nothing else, so there is no depth to overflow, no number to blow up
and no key that two readers could understand differently: duplicate keys, unknown fields, NaN, control
characters and lone surrogates are all refused. A general JSON parser would build a hundred megabytes
of nested lists into gigabytes of objects before anything could be checked.
"""

from __future__ import annotations

import re
from typing import NoReturn

from zimage_core.errors import BadFile, printable
from zimage_core.weights.source import AGAIN, check_text

MAX_TENSORS = 100_000
MAX_NAME = 1024
MAX_DIMENSIONS = 8
MAX_DIGITS = 20

Entry = tuple[str, list[int], list[int]]  # dtype, shape, data_offsets

_BLANKS = (b" ", b"\t", b"\r", b"\n")
_SPACE = re.compile(rb"[ \t\r\n]*")
_NUMBER = re.compile(rb"-?[0-9.eE+-]+")
_INTEGER = re.compile(rb"0|[1-9][0-9]{0,%d}" % (MAX_DIGITS - 1))
# An entry as every writer lays it out, for speed; whatever looks different goes token by token.
_NUMBERS = rb"((?:0|[1-9][0-9]{0,%d})(?:,(?:0|[1-9][0-9]{0,%d})){0,%d})" % (
    MAX_DIGITS - 1, MAX_DIGITS - 1, MAX_DIMENSIONS - 1
)  # fmt: skip
_USUAL_ENTRY = re.compile(
    rb'\{"dtype":"([A-Z0-9_]{1,16})","shape":\[%s?\],"data_offsets":\[%s\]\}' % (_NUMBERS, _NUMBERS)
)
_CONTROL = re.compile(rb"[\x00-\x1f]")


class HeaderParser:
    """The header's JSON: an object of tensors, and of one map from text to text.

    Args:
        path: The file, for messages.
        data: The header's bytes.
    """

    def __init__(self, path: str, data: bytearray) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def fail(self, fault: str) -> NoReturn:
        """BadFile with this fault."""
        raise BadFile(self.path, f"damaged header: {fault}", AGAIN)

    def skip(self) -> None:
        """Pass over white space."""
        if self.data[self.position : self.position + 1] in _BLANKS:
            found = _SPACE.match(self.data, self.position)
            self.position = found.end() if found else self.position

    def take(self, character: bytes) -> bool:
        """Pass over this character if it comes next."""
        if not self.data.startswith(character, self.position):
            self.skip()
            if not self.data.startswith(character, self.position):
                return False
        self.position += 1
        return True

    def expect(self, character: bytes, where: str) -> None:
        """Pass over this character or fail."""
        if not self.take(character):
            next_bytes = bytes(self.data[self.position : self.position + 8])
            found = printable(next_bytes) if next_bytes else "the end"
            self.fail(f"JSON expected {character.decode()} {where} at byte {self.position}, found {found}")

    def text(self, where: str) -> str:
        """A JSON string; escapes are resolved, control characters and lone surrogates refused."""
        self.expect(b'"', where)
        start = end = self.position
        while True:
            end = self.data.find(b'"', end)
            if end < 0:
                self.fail(f"JSON string without an end {where}, at byte {start}")
            slashes = end
            while slashes > start and self.data[slashes - 1] == 0x5C:
                slashes -= 1
            if (end - slashes) % 2 == 0:
                break
            end += 1
        self.position = end + 1
        raw = bytes(self.data[start:end])
        try:
            text = raw.decode("utf-8")
            if b"\\" in raw:
                import json

                text = json.loads(f'"{text}"')
                text.encode("utf-8")  # a lone surrogate cannot be
            elif _CONTROL.search(raw):
                self.fail(f"JSON string with a control character {where}")
        except UnicodeError:
            self.fail(f"JSON string {where} is not UTF-8 text")
        except ValueError:
            self.fail(f"JSON string {where} has an invalid escape")
        return text

    def number(self, what: str) -> int:
        """A non-negative integer of at most 20 digits."""
        self.skip()
        found = _NUMBER.match(self.data, self.position)
        digits = found.group() if found else bytes(self.data[self.position : self.position + 8])
        if not found or not _INTEGER.fullmatch(digits):
            shown = printable(digits.decode("latin-1"), 30)
            self.fail(
                f"{what} holds {shown}, a non-negative integer of {MAX_DIGITS} digits at most is wanted"
            )
        self.position = found.end()
        return int(digits)

    def numbers(self, what: str, limit: int) -> list[int]:
        """An array of such integers."""
        self.expect(b"[", f"to open {what}")
        items: list[int] = []
        if self.take(b"]"):
            return items
        while True:
            items.append(self.number(what))
            if len(items) > limit:
                self.fail(f"{what} has more than {limit} dimensions or numbers")
            if self.take(b"]"):
                return items
            self.expect(b",", f"in {what}")

    def metadata(self) -> dict[str, str]:
        """The object under __metadata__: text to text."""
        self.expect(b"{", "to open __metadata__")
        result: dict[str, str] = {}
        if self.take(b"}"):
            return result
        while True:
            key = self.text("as a key of __metadata__")
            if key in result:
                self.fail(f"duplicate key {printable(key, 60)} in __metadata__")
            self.expect(b":", "in __metadata__")
            result[key] = self.text("(values of __metadata__ are strings)")
            if self.take(b"}"):
                return result
            self.expect(b",", "in __metadata__")

    def entry(self, name: str) -> Entry:
        """dtype, shape and data_offsets of one tensor, in any order, each once."""
        usual = _USUAL_ENTRY.match(self.data, self.position)
        if usual and usual[3].count(b",") == 1:
            self.position = usual.end()
            sizes = [int(digits) for digits in (usual[2] or b"").split(b",") if digits]
            return usual[1].decode(), sizes, [int(digits) for digits in usual[3].split(b",")]
        shown = f"tensor {printable(name, 80)}"
        self.expect(b"{", f"to open {shown}")
        dtype, shape, offsets, seen = "", [0], [0], set()
        more = not self.take(b"}")
        while more:
            field = self.text(f"as a field of {shown}")
            if field in seen:
                self.fail(f"duplicate field {printable(field, 40)} in {shown}")
            seen.add(field)
            self.expect(b":", f"in {shown}")
            if field == "dtype":
                dtype = self.text(f"as the dtype of {shown}")
            elif field == "shape":
                shape = self.numbers(f"the shape of {shown}", MAX_DIMENSIONS)
            elif field == "data_offsets":
                offsets = self.numbers(f"data_offsets of {shown}", 2)
            else:
                self.fail(f"unknown field {printable(field, 40)} in {shown}")
            more = not self.take(b"}")
            if more:
                self.expect(b",", f"in {shown}")
        missing = [field for field in ("dtype", "shape", "data_offsets") if field not in seen]
        if missing:
            self.fail(f"{shown} is missing {' and '.join(missing)}")
        if len(offsets) != 2:
            self.fail(f"data_offsets of {shown} has length {len(offsets)}, 2 is wanted")
        return dtype, shape, offsets

    def parse(self) -> tuple[dict[str, str], dict[str, Entry]]:
        """The metadata, and name to (dtype, shape, data_offsets).

        Raises:
            BadFile: Anything but the expected structure.
        """
        metadata: dict[str, str] | None = None
        tensors: dict[str, Entry] = {}
        if self.data.count(b'"data_offsets"') > MAX_TENSORS:
            self.fail(f"the tensor count exceeds {MAX_TENSORS}")
        if not self.data.startswith(b"{"):
            self.fail(f"JSON must begin with {{, found {printable(bytes(self.data[:8]))}")
        self.expect(b"{", "to open the header")
        more = not self.take(b"}")
        while more:
            name = self.text("as a tensor name")
            self.expect(b":", "after a tensor name")
            if name == "__metadata__":
                if metadata is not None:
                    self.fail("duplicate __metadata__")
                metadata = self.metadata()
            elif name in tensors:
                self.fail(f"duplicate tensor name {printable(name, 80)}")
            elif len(tensors) >= MAX_TENSORS:
                self.fail(f"the tensor count exceeds {MAX_TENSORS}")
            else:
                check_text(self.path, "tensor name", name, MAX_NAME)
                tensors[name] = self.entry(name)
            more = not self.take(b"}")
            if more:
                self.expect(b",", "between tensors")
        self.skip()
        if self.position != len(self.data):
            self.fail(f"{len(self.data) - self.position} extra bytes are trailing after the JSON")
        return metadata or {}, tensors
