"""Strict parser of a safetensors header, which is JSON.

The header is an object that maps names to tensors, and `__metadata__` to an object of strings. Duplicate
keys, unknown fields, numbers that cannot be sizes and lone surrogates are refused, so that no two readers
understand a file differently.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from zimage_core.errors import BadFile, printable
from zimage_core.files.untrusted import MAX_DIGITS
from zimage_core.weights.source import AGAIN, check_text

MAX_TENSORS = 100_000
MAX_NAME = 1024
MAX_DIMENSIONS = 8
MAX_BRACKETS = 5 * MAX_TENSORS
"""Most opening brackets in a header, including those inside strings. A tensor has two; millions of empty
lists would take gigabytes of memory before anything could be checked."""
MAX_QUOTES = 40 * MAX_TENSORS
"""Most quotation marks in a header. A tensor has ten; the others are for metadata that is itself JSON."""

_FIELDS = {"dtype", "shape", "data_offsets"}

Entry = tuple[str, list[int], list[int]]  # dtype, shape, data_offsets


class _Literal(str):
    """A number that cannot be a size, as the file writes it."""


class HeaderParser:
    """Parser of one header; JSON objects stay tuples of pairs until checked: a dict would hide duplicates.

    Args:
        path: The file, for messages.
        data: The header's bytes.
    """

    def __init__(self, path: str, data: bytearray) -> None:
        self.path = path
        self.data = data
        self._objects = 0
        self._numbers = 0

    def fail(self, fault: str) -> NoReturn:
        """BadFile with this fault."""
        raise BadFile(self.path, f"damaged header: {fault}", AGAIN)

    def parse(self) -> tuple[dict[str, str], dict[str, Entry]]:
        """Parse the header into its metadata and a dict: tensor name -> (dtype, shape, data_offsets).

        Raises:
            BadFile: The header has another structure; the message says where.
        """
        metadata: dict[str, str] | None = None
        tensors: dict[str, Entry] = {}
        for name, value in self._document():
            self._check_unicode(name, "as a tensor name")
            if name == "__metadata__":
                if metadata is not None:
                    self.fail("duplicate __metadata__")
                metadata = self._metadata(value)
            elif name in tensors:
                self.fail(f"duplicate tensor name {printable(name, 80)}")
            elif len(tensors) >= MAX_TENSORS:
                self._too_many_tensors()
            else:
                check_text(self.path, "tensor name", name, MAX_NAME)
                tensors[name] = self._entry(f"tensor {printable(name, 80)}", value)
        return metadata or {}, tensors

    def _document(self) -> tuple[tuple[str, Any], ...]:
        """Parse the header's JSON; only its syntax and its size are checked."""
        if not self.data.startswith(b"{"):
            self.fail(f"JSON must begin with {{, found {printable(bytes(self.data[:8]))}")
        if self.data.count(b"[") > MAX_BRACKETS:
            self.fail(f"it has more than {MAX_BRACKETS} lists")
        if self.data.count(b'"') > MAX_QUOTES:
            self.fail(f"it has more than {MAX_QUOTES // 2} texts")
        decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._number,
            parse_float=self._number,
            parse_constant=self._number,
        )
        try:
            text = self.data.decode("utf-8")
            document, end = decoder.raw_decode(text)
        except UnicodeDecodeError as error:
            self.fail(f"JSON is not UTF-8 text at byte {error.start}")
        except json.JSONDecodeError as error:
            self.fail(f"invalid JSON at character {error.pos}: {error.msg}")
        except RecursionError:
            self.fail("JSON nested too deep")
        if rest := text[end:].lstrip(" \t\r\n"):
            self.fail(f"{len(rest.encode())} extra bytes are trailing after the JSON")
        return document  # type: ignore[no-any-return]  # it begins with a brace, so it is what _object returns

    def _object(self, pairs: list[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
        self._objects += 1
        if self._objects > MAX_TENSORS + 2:  # with the metadata and the header itself
            self._too_many_tensors()
        return tuple(pairs)

    def _number(self, digits: str) -> int | _Literal:
        self._numbers += 1
        if self._numbers > MAX_TENSORS * (MAX_DIMENSIONS + 2):
            self._too_many_tensors()
        # isdigit() is false for a minus sign, so negative numbers are refused too
        return int(digits) if len(digits) <= MAX_DIGITS and digits.isdigit() else _Literal(digits)

    def _too_many_tensors(self) -> NoReturn:
        self.fail(f"the tensor count exceeds {MAX_TENSORS}")

    def _metadata(self, pairs: Any) -> dict[str, str]:
        if not isinstance(pairs, tuple):
            self.fail(f"JSON expected {{ to open __metadata__, found {_shown(pairs)}")
        result: dict[str, str] = {}
        for key, value in pairs:
            self._check_unicode(key, "as a key of __metadata__")
            if key in result:
                self.fail(f"duplicate key {printable(key, 60)} in __metadata__")
            result[key] = self._text(value, "(values of __metadata__ are strings)")
        return result

    def _entry(self, shown: str, pairs: Any) -> Entry:
        """dtype, shape and data_offsets of one tensor, in any order, each once."""
        if not isinstance(pairs, tuple):
            self.fail(f"JSON expected {{ to open {shown}, found {_shown(pairs)}")
        fields = dict(pairs)
        if fields.keys() != _FIELDS or len(fields) != len(pairs):
            self._refuse_fields(shown, [field for field, _ in pairs])
        dtype = self._text(fields["dtype"], f"as the dtype of {shown}")
        shape = self._sizes(fields["shape"], f"the shape of {shown}", MAX_DIMENSIONS)
        offsets = self._sizes(fields["data_offsets"], f"data_offsets of {shown}", 2)
        if len(offsets) != 2:
            self.fail(f"data_offsets of {shown} has length {len(offsets)}, 2 is wanted")
        return dtype, shape, offsets

    def _refuse_fields(self, shown: str, found: list[str]) -> NoReturn:
        for number, field in enumerate(found):
            if field not in _FIELDS:
                self.fail(f"unknown field {printable(field, 40)} in {shown}")
            if field in found[:number]:
                self.fail(f"duplicate field {field} in {shown}")
        missing = [field for field in ("dtype", "shape", "data_offsets") if field not in found]
        self.fail(f"{shown} is missing {' and '.join(missing)}")

    def _sizes(self, items: Any, what: str, limit: int) -> list[int]:
        if not isinstance(items, list):
            self.fail(f"JSON expected [ to open {what}, found {_shown(items)}")
        if len(items) > limit:
            self.fail(f"{what} has more than {limit} dimensions or numbers")
        for item in items:
            if type(item) is not int:
                wanted = f"a non-negative integer of {MAX_DIGITS} digits at most is wanted"
                self.fail(f"{what} holds {_shown(item)}, {wanted}")
        return items

    def _text(self, value: Any, where: str) -> str:
        if type(value) is not str:
            self.fail(f'JSON expected " {where}, found {_shown(value)}')
        self._check_unicode(value, where)
        return value

    def _check_unicode(self, text: str, where: str) -> None:
        """Refuse lone surrogates, which JSON can write as an escape."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"JSON string {where} is not UTF-8 text")


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "{" if isinstance(value, tuple) else "["
    return printable(value if isinstance(value, _Literal) else json.dumps(value), 30)
