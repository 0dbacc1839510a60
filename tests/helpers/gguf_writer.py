"""A small GGUF writer for tests: any format as raw blocks, any metadata, and every field can be falsified.

    GGUFWriter().key("general.architecture", "qwen3").tensor("a.weight", array).write(path)
    write_gguf(path, {"a.weight": array, "b.weight": random_packed("Q4_K", (8, 256), rng)}, {"x.y": 3})

Separate from the reader on purpose: it shares the descriptors of the block formats, no code.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.reference.encode import finite_scales

KINDS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
    "f32": (6, "f"), "bool": (7, "B"), "str": (8, ""), "array": (9, ""), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}  # fmt: skip
"""GGUF's value types: number and struct code."""

_NUMPY = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}


@dataclass(frozen=True)
class Packed:
    """Raw blocks of a tensor: format, logical shape (PyTorch's order) and bytes."""

    format: BlockFormat
    shape: tuple[int, ...]
    data: bytes


class Raw(bytes):
    """A metadata value that is written as these bytes, whatever its type says."""


def random_packed(fmt: str | BlockFormat, shape: Sequence[int], rng: np.random.Generator) -> Packed:
    """Random blocks with finite scales below 2."""
    fmt = FORMATS[fmt] if isinstance(fmt, str) else fmt
    size = (int(np.prod(shape[:-1])), fmt.row_bytes(shape[-1]))
    data = finite_scales(rng.integers(0, 256, size, dtype=np.uint8), fmt)
    return Packed(fmt, tuple(shape), data.tobytes())


def bfloat16(array: np.ndarray) -> Packed:
    """The upper halves of float32 numbers."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16
    return Packed(FORMATS["BF16"], array.shape, bits.astype("<u2").tobytes())


@dataclass
class _Tensor:
    name: str | bytes
    dims: list[int]
    number: int
    data: bytes
    offset: int | None
    dim_count: int | None
    name_length: int | None
    gap: int


@dataclass
class GGUFWriter:
    """Collects keys and tensors, then builds the file; every method returns the writer.

    Args:
        order: "<" little endian or ">" big endian.
        version: The number in the header.
        alignment: Of the data. Anything but 32 is also written as general.alignment.
        prefix: Put before each tensor name.
        tensor_count, key_count: Lies for the header.
        pad: Fill bytes between tensors.
        tail: Bytes after the last tensor.
    """

    order: str = "<"
    version: int = 3
    alignment: int = 32
    prefix: str = ""
    tensor_count: int | None = None
    key_count: int | None = None
    pad: bytes = b"\0"
    tail: bytes = b""
    keys: list[tuple[str | bytes, int, Any, int | None]] = field(default_factory=list)
    tensors: list[_Tensor] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)

    def key(
        self, name: str | bytes, value: Any, kind: str | int | None = None, length: int | None = None
    ) -> GGUFWriter:
        """Add a key.

        Args:
            name: The key; bytes are written as they are.
            value: bool, int, float, str, a list of one of these, or `Raw`.
            kind: A name of KINDS or a type number; inferred where None (int -> u32, or i32, i64).
                Of a list it is the type of the items.
            length: A lie about the key's length.
        """
        if isinstance(value, (list, tuple, np.ndarray)):
            items = list(value)
            inner = kind or (_infer(items[0]) if items else "u32")
            value, kind = Raw(self._array(str(inner), items)), "array"
        kind = kind if kind is not None else _infer(value)
        self.keys.append((name, KINDS[kind][0] if isinstance(kind, str) else kind, value, length))
        return self

    def tensor(
        self,
        name: str | bytes,
        content: np.ndarray | Packed,
        *,
        number: int | None = None,
        dims: Sequence[int] | None = None,
        offset: int | None = None,
        dim_count: int | None = None,
        name_length: int | None = None,
        gap: int = 0,
    ) -> GGUFWriter:
        """Add a tensor: an array of plain numbers, or `Packed` blocks. The rest are lies.

        Args:
            name: Its name, prefixed by the writer; bytes are written as they are.
            content: The values.
            number: Type number to write.
            dims: Dimensions to write, in GGUF's order (contiguous axis first).
            offset: Offset in the data to write.
            dim_count: Number of dimensions to write.
            name_length: Length of the name to write.
            gap: Bytes left free in front of the data, on top of the alignment.
        """
        if isinstance(content, Packed):
            fmt, shape, data = content.format, content.shape, content.data
        else:
            fmt, shape = FORMATS[_NUMPY[content.dtype.name]], content.shape
            data = np.ascontiguousarray(content).astype(content.dtype.newbyteorder(self.order)).tobytes()
        if isinstance(name, str):
            name = self.prefix + name
        self.tensors.append(
            _Tensor(
                name,
                list(shape)[::-1] if dims is None else list(dims),
                (42 if fmt.name == "Q2_0_128" else fmt.ggml_type or 0) if number is None else number,
                data,
                offset,
                dim_count,
                name_length,
                gap,
            )
        )
        return self

    def build(self, data_order: Sequence[int] | None = None) -> bytes:
        """The bytes of the file; `marks` then holds where each part starts.

        Args:
            data_order: Indices of the tensors in the order of their data; as added where None.
        """
        out = bytearray()

        def put(mark: str, data: bytes) -> None:
            self.marks[mark] = len(out)
            out.extend(data)

        keys = list(self.keys)
        if self.alignment != 32:
            keys.append(("general.alignment", 4, self.alignment, None))
        put("magic", b"GGUF")
        put("version", self._pack("I", self.version))
        put(
            "tensor_count",
            self._pack("Q", len(self.tensors) if self.tensor_count is None else self.tensor_count),
        )
        put("key_count", self._pack("Q", len(keys) if self.key_count is None else self.key_count))
        for i, (name, number, value, length) in enumerate(keys):
            put(f"key{i}", self._text(name, length))
            put(f"key{i}.type", self._pack("I", number))
            put(f"key{i}.value", self._value(number, value))
        data, offsets = self._data(range(len(self.tensors)) if data_order is None else data_order)
        for i, tensor in enumerate(self.tensors):
            put(f"tensor{i}", self._text(tensor.name, tensor.name_length))
            put(
                f"tensor{i}.dims",
                self._pack("I", len(tensor.dims) if tensor.dim_count is None else tensor.dim_count),
            )
            out.extend(b"".join(self._pack("Q", size) for size in tensor.dims))
            put(f"tensor{i}.type", self._pack("I", tensor.number))
            put(f"tensor{i}.offset", self._pack("Q", offsets[i] if tensor.offset is None else tensor.offset))
        out.extend(self.pad * (-len(out) % self.alignment) if self.tensors else b"")
        put("data", data)
        for i, offset in offsets.items():
            self.marks[f"tensor{i}.data"] = self.marks["data"] + offset
        put("tail", self.tail)
        return bytes(out)

    def write(self, path: Path) -> Path:
        """Build the file at `path`."""
        path.write_bytes(self.build())
        return path

    def _pack(self, code: str, number: float) -> bytes:
        return struct.pack(self.order + code, number)

    def _text(self, text: str | bytes, length: int | None = None) -> bytes:
        data = text.encode() if isinstance(text, str) else text
        return self._pack("Q", len(data) if length is None else length) + data

    def _value(self, number: int, value: Any) -> bytes:
        if isinstance(value, Raw):
            return bytes(value)
        code = next((code for n, code in KINDS.values() if n == number), "Q")
        return self._pack(code, value) if code else self._text(value)

    def _array(self, kind: str, items: list[Any]) -> bytes:
        number = KINDS[kind][0]
        body = b"".join(self._value(number, item) for item in items)
        return self._pack("I", number) + self._pack("Q", len(items)) + body

    def _data(self, order: Sequence[int]) -> tuple[bytes, dict[int, int]]:
        data, offsets = bytearray(), {}
        for i in order:
            data.extend(self.pad * (-len(data) % self.alignment + self.tensors[i].gap))
            offsets[i] = len(data)
            data.extend(self.tensors[i].data)
        return bytes(data), offsets


def _infer(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, np.integer)):
        return "u32" if 0 <= value < 1 << 32 else "i32" if -(1 << 31) <= value < 0 else "i64"
    return "f32" if isinstance(value, (float, np.floating)) else "str"


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray | Packed],
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """An honest file in one call; `options` go to GGUFWriter (version, alignment, order, prefix)."""
    writer = GGUFWriter(**options)
    for name, value in (metadata or {}).items():
        writer.key(name, value)
    for name, content in tensors.items():
        writer.tensor(name, content)
    return writer.write(path)
