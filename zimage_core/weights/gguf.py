"""Reader of GGUF files, versions 2 and 3, little and big endian.

Layout: magic, version, tensor count, key count; the keys with their values; the tensor table (name,
dimensions, type, offset); padding to `general.alignment`; the data. The contiguous dimension is stored
first, so a shape is the stored dimensions in reverse.

Every length is compared with the rest of the file before it is used. Names must be unique, short and
printable; a row must be a whole number of blocks; tensors must start on the alignment, end inside the file
and not overlap. The order of the data, gaps and trailing bytes are not restricted; `download.remarks` tells
of many trailing bytes.

Source: ggml/docs/gguf.md.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from zimage_core.errors import BadFile, UnknownFormat, printable
from zimage_core.formats import BlockFormat, by_ggml_type, q2_0_variant
from zimage_core.weights.cursor import MAX_KEY, Cursor, LazyArray
from zimage_core.weights.source import AGAIN, Source, TensorInfo, WeightFile, check_text

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME = 1024
MAX_DIMENSIONS = 4
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20
VERSIONS = (2, 3)

_SMALLEST_KEY = 13  # length, type and the shortest value
_SMALLEST_TENSOR = 24  # length, dimension count, type and offset
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_Q2_0 = 42
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5}\.gguf)")  # llama-gguf-split's names

_Row = tuple[str, tuple[int, ...], BlockFormat, int]  # name, shape, format, offset in the data


class GGUFFile(WeightFile):
    """A GGUF file; the header is read and checked, the data is not touched.

    Args:
        path: The file, or an open Source that this object takes over.
        mmap: Hand out tensors as views of a private map; False reads each into its own memory.

    Attributes:
        version: 2 or 3.
        alignment: Tensors start on multiples of this many bytes.
        metadata: Key -> int, float, bool, str or LazyArray.

    Raises:
        BadFile: The file is no GGUF file, is damaged or cut, or is one part of a split model.
        UnknownFormat: The file holds a tensor type that is not described in zimage_core.formats.
    """

    kind = "gguf"

    def __init__(self, path: str | PathLike[str] | Source, mmap: bool = True) -> None:
        super().__init__(path, mmap)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        head = bytes(self.source.read_at(0, min(8, self.size)))
        if head[:4] != b"GGUF"[: len(head)]:
            fault = f"not a GGUF file: magic {printable(head[:4])}, b'GGUF' is wanted"
            raise BadFile(self.path, fault, "get the model as GGUF")
        order, self.version = self._order(head)
        self.swapped = (order == "<") != (sys.byteorder == "little")
        cursor = Cursor(self.source, order, 8)
        tensors = cursor.u64("the tensor count")
        keys = cursor.u64("the key count")
        cursor.require_bytes(keys * _SMALLEST_KEY, f"metadata with a count of {keys} keys")
        if keys > MAX_KEYS:
            cursor.fail(f"a count of {keys} metadata keys, at most {MAX_KEYS} are allowed")
        self.metadata, self.alignment = self._read_metadata(cursor, keys)
        self._refuse_parts()
        cursor.require_bytes(tensors * _SMALLEST_TENSOR, f"the table with a count of {tensors} tensors")
        if tensors > MAX_TENSORS:
            cursor.fail(f"a count of {tensors} tensors, at most {MAX_TENSORS} are allowed")
        table = [self._read_tensor(cursor) for _ in range(tensors)]
        self._data_start = -(-cursor.position // self.alignment) * self.alignment
        self._place(table)
        self._check_original_shapes()

    def _order(self, head: bytes) -> tuple[str, int]:
        """Byte order and version; the byte order is the one that gives a version this reader supports."""
        if len(head) < 8:
            fault = f"truncated: {len(head)} bytes, a GGUF header has at least 24"
            raise BadFile(self.path, fault, AGAIN)
        for order in "<>":
            version = struct.unpack(order + "I", head[4:])[0]
            if version in VERSIONS:
                return order, version
        version = struct.unpack("<I", head[4:])[0]
        hint = "convert the model again with current tools" if version == 1 else AGAIN
        raise BadFile(self.path, f"GGUF version {version} cannot be read, versions 2 and 3 can", hint)

    def _read_metadata(self, cursor: Cursor, count: int) -> tuple[dict[str, Any], int]:
        metadata: dict[str, Any] = {}
        alignment = 32
        for _ in range(count):
            key = check_text(self.path, "metadata key", cursor.text("a metadata key", MAX_KEY), MAX_KEY)
            if key in metadata:
                cursor.fail(f"duplicate metadata key {printable(key, 60)}")
            shown = printable(key, 60)
            kind = cursor.u32(f"the value type of key {shown}")
            value = metadata[key] = cursor.value(kind, shown)
            if key == "general.alignment":
                if kind != 4 or not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
                    cursor.fail(
                        f"general.alignment is {printable(value, 40)} (value type {kind}); "
                        f"a u32 power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT} is allowed"
                    )
                alignment = value
            elif key == "general.architecture" and not isinstance(value, str):
                cursor.fail(f"general.architecture has value type {kind}, a string is wanted")
        return metadata, alignment

    def _refuse_parts(self) -> None:
        """Refuse one part of a split model: it holds only some of the tensors."""
        count = self.metadata.get("split.count", 0)
        if isinstance(count, int) and count > 1:
            number = self.metadata.get("split.no", 0)
            part = number + 1 if isinstance(number, int) else "?"
            fault = f"part {part} of {count} of a split model, the whole model in one file is wanted"
            numbered = _PART.fullmatch(Path(self.path).name)
            first = f"{numbered[1]}-00001-of-{numbered[2]}" if numbered else "FIRST_PART.gguf"
            command = f"llama-gguf-split --merge {printable(first, 120)} OUT.gguf"
            raise BadFile(self.path, fault, f"join the parts with `{command}`")

    def _read_tensor(self, cursor: Cursor) -> _Row:
        name = check_text(self.path, "tensor name", cursor.text("a tensor name", MAX_NAME), MAX_NAME)
        shown = printable(name, 80)
        dimensions = cursor.u32(f"the dimension count of tensor {shown}")
        if dimensions > MAX_DIMENSIONS:
            cursor.fail(f"tensor {shown} has {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed")
        shape = tuple([cursor.u64(f"a dimension of tensor {shown}") for _ in range(dimensions)])[::-1]
        if 0 in shape:
            cursor.fail(f"tensor {shown} has the shape {shape} with a dimension of zero")
        number = cursor.u32(f"the type of tensor {shown}")
        offset = cursor.u64(f"the offset of tensor {shown}")
        try:
            return name, shape, by_ggml_type(number), offset
        except UnknownFormat as error:
            raise UnknownFormat(f"{printable(self.path)}: tensor {shown}: {error}") from None

    def _place(self, table: list[_Row]) -> None:
        """Fill `tensors` from the table, once every row fits: aligned, inside the file, no overlap."""
        variant = self._q2_0_variant(table)
        for name, shape, fmt, offset in table:
            shown = printable(name, 80)
            if fmt.ggml_type == _Q2_0 and variant is not None:
                fmt = variant
            *rows, k = shape or (1,)
            if k % fmt.weights:
                fault = f"tensor {shown} has rows of {k}, its type {fmt.name} stores blocks of {fmt.weights}"
                raise BadFile(self.path, fault, AGAIN)
            if self.swapped and fmt.weights > 1:
                fault = f"tensor {shown} has type {fmt.name}, which cannot be read from a big-endian file"
                raise BadFile(self.path, fault, "get the little-endian file")
            if offset % self.alignment:
                fault = f"the offset {offset} of tensor {shown} is not aligned to {self.alignment} bytes"
                raise BadFile(self.path, fault, AGAIN)
            if name in self.tensors:
                raise BadFile(self.path, f"duplicate tensor name {shown}", AGAIN)
            nbytes = math.prod(rows) * fmt.row_bytes(k)
            self.tensors[name] = TensorInfo(name, shape, fmt, self._data_start + offset, nbytes)
        ordered = sorted(self.tensors.values(), key=lambda info: info.offset)
        if ordered:
            last = max(ordered, key=lambda info: info.offset + info.nbytes)
            end = last.offset + last.nbytes
            if end > self.size:
                shown = printable(last.name, 80)
                fault = f"truncated: needs {end} bytes, the file has {self.size} (tensor {shown} is cut)"
                raise BadFile(self.path, fault, AGAIN)
        for first, second in itertools.pairwise(ordered):
            if first.offset + first.nbytes > second.offset:
                names = f"{printable(first.name, 80)} and {printable(second.name, 80)}"
                raise BadFile(self.path, f"tensors {names} overlap", AGAIN)

    def _q2_0_variant(self, table: list[_Row]) -> BlockFormat | None:
        """Block format of type number 42 in this file, decided by its largest such tensor, or None."""
        largest, rows, start = 0, 1, 0
        for _, shape, fmt, offset in table:
            weights = math.prod(shape)
            if fmt.ggml_type == _Q2_0 and weights > largest:
                largest, rows, start = weights, shape[-1] if shape else 1, offset
        if not largest:
            return None
        end = min((offset for *_, offset in table if offset > start), default=self.size - self._data_start)
        return q2_0_variant(rows, largest, end - start)

    def _check_original_shapes(self) -> None:
        """Refuse original shapes, as ComfyUI's converter notes them, that do not match a tensor's size."""
        for key, value in self.metadata.items():
            info = self.tensors.get(key.removeprefix(_ORIGINAL_SHAPE))
            if not key.startswith(_ORIGINAL_SHAPE) or info is None:
                continue
            shown = printable(key, 120)
            if not isinstance(value, LazyArray) or len(value) > 2 * MAX_DIMENSIONS:
                raise BadFile(self.path, f"{shown} is not a shape", AGAIN)
            if math.prod(info.shape) != math.prod(size if isinstance(size, int) else 0 for size in value):
                fault = f"{shown} is the shape {value.tolist()}, the tensor has the shape {list(info.shape)}"
                raise BadFile(self.path, fault, AGAIN)
