"""Reads and writes llama.cpp's two file formats of importance matrices; files are not trusted.

A GGUF (since July 2025) has `general.type` "imatrix", keys `imatrix.*`, and for each weight matrix, in
float32, the sums of squares `NAME.in_sum2` [K] and the number of rows in them, `NAME.counts` [1].

A legacy file has counts and lengths as int32, and for each matrix the sums times ncall / rows. The number of
chunks and the name of the data follow; older files lack these two.

Source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import BadFile, WrongModel, printable
from zimage_core.formats import FORMATS
from zimage_core.weights import gguf_writer
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.magic import refuse_known
from zimage_core.weights.source import AGAIN, Source, check_text

MAX_ENTRIES = 65_536
MAX_NAME = 1024
MAX_DATASET = 65_535
PREFIX = "model.diffusion_model."
"""Prefix that stable-diffusion.cpp adds to the names of a single file."""
SUMS, COUNTS = ".in_sum2", ".counts"
KIND, DATASETS = "general.type", "imatrix.datasets"
CHUNKS, CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class Sums:
    """Statistics of the inputs of one matrix.

    Args:
        squares: Sum over rows of x^2, float64 [K].
        count: Number of rows.
    """

    squares: Tensor
    count: int

    @property
    def width(self) -> int:
        """Number of input channels K."""
        return len(self.squares)

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.squares + other.squares, self.count + other.count)


Content = tuple[Mapping[str, Sums], tuple[str, ...], int]
"""Contents of a file: entries, datasets and chunks, as in `imatrix.Imatrix`."""


def read(path: str | os.PathLike[str]) -> Content:
    """Read a file of either format.

    Raises:
        BadFile: The file is damaged, cut, or of another kind.
        WrongModel: The file is a GGUF without importances.
    """
    source = Source(path, mmap=False)
    try:
        head = bytes(source.read_at(0, min(512, source.size)))
        if head[:4] == b"GGUF":
            return _from_gguf(GGUFFile(source))
        refuse_known(source.path, head)
        return _from_dat(source)
    finally:
        source.close()


def _entry_name(path: str, name: str) -> str:
    return check_text(path, "tensor name", name, MAX_NAME).removeprefix(PREFIX)


def _checked(path: str, name: str, sums: Tensor) -> Tensor:
    if not bool(torch.isfinite(sums).all()) or bool((sums < 0).any()):
        fault = f"{printable(name, 80)} holds a number that is negative or not finite"
        raise BadFile(path, fault, "collect it again")
    return sums.double()


# --- GGUF ----------------------------------------------------------------------------


def _from_gguf(file: GGUFFile) -> Content:
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        kind = file.metadata.get("general.architecture", file.metadata.get(KIND, "unknown kind"))
        fault = (
            f"a GGUF file of {printable(kind, 60)} without sums of squares, an importance matrix is wanted"
        )
        raise WrongModel(file.path, fault, "make one with `zimage imatrix`")
    entries: dict[str, Sums] = {}
    for name in names:
        short = _entry_name(file.path, name)
        if short in entries:
            raise BadFile(file.path, f"{printable(short, 80)} comes twice", AGAIN)
        entries[short] = _gguf_entry(file, name)
    datasets = file.metadata.get(DATASETS, ())
    texts = tuple(printable(item, MAX_DATASET) for item in datasets) if not isinstance(datasets, str) else ()
    chunks = file.metadata.get(CHUNKS, 0)
    return entries, texts, max(chunks, 0) if isinstance(chunks, int) else 0


def _gguf_entry(file: GGUFFile, name: str) -> Sums:
    squares = _floats(file, name + SUMS)
    counts = _floats(file, name + COUNTS).flatten()
    if len(counts) != 1:
        fault = f"{printable(name + COUNTS, 80)} has {len(counts)} counts, 1 wanted (matrices of experts?)"
        raise BadFile(file.path, fault, "give an imatrix of this model")
    count = _checked(file.path, name + COUNTS, counts).clamp_max(2.0**53).round()
    if squares.numel() != squares.shape[-1]:
        fault = f"{printable(name, 80)} has sums of the shape {list(squares.shape)}: matrices of experts"
        raise BadFile(file.path, fault, "no model of this library has experts; give an imatrix of Z-Image")
    return Sums(_checked(file.path, name, squares.flatten()), int(count))


def _floats(file: GGUFFile, name: str) -> Tensor:
    info = file.tensors.get(name)
    if info is None or info.format.name != "F32":
        found = "is missing" if info is None else f"is {info.format.name}"
        raise BadFile(file.path, f"{printable(name, 80)} {found}, F32 is wanted", "collect it again")
    return file.tensor(name).dequantize(torch.float32)


def to_gguf(entries: Mapping[str, Sums], datasets: Sequence[str], chunks: int) -> Iterator[bytes]:
    """A GGUF file of importances, in chunks of bytes."""
    keys: dict[str, Any] = {
        KIND: "imatrix",
        DATASETS: gguf_writer.TypedArray(map(_sound, datasets), "string"),
        CHUNKS: min(chunks, 2**32 - 1),
        CHUNK_SIZE: min(_chunk_size(entries, chunks), 2**32 - 1),
    }
    tensors: dict[str, Tensor] = {}
    for name, sums in entries.items():
        tensors |= {name + SUMS: sums.squares[None], name + COUNTS: torch.tensor([[sums.count]])}
    rows = ((name, tuple(tensor.shape), FORMATS["F32"]) for name, tensor in tensors.items())
    layout = gguf_writer.lay_out(keys, rows)
    yield layout.header
    at = len(layout.header)
    for name, tensor in tensors.items():
        start, _ = layout.places[name]
        data = tensor.float().numpy().astype("<f4").tobytes()
        yield bytes(start - at) + data
        at = start + len(data)
    yield bytes(layout.nbytes - at)


def _sound(name: str) -> str:
    """The name made valid UTF-8 and cut to the length that the reader accepts."""
    return name[:MAX_DATASET].encode("utf-8", "replace").decode()


def _chunk_size(entries: Mapping[str, Sums], chunks: int) -> int:
    """Number of rows per chunk for the matrix with the most rows."""
    most = max((sums.count for sums in entries.values()), default=0)
    return max(1, math.ceil(most / max(1, chunks)))


# --- legacy --------------------------------------------------------------------------


class _Reader:
    """Sequential reader that compares every length with the rest of the file before it is used."""

    def __init__(self, source: Source) -> None:
        self.source, self.position = source, 0

    @property
    def left(self) -> int:
        return self.source.size - self.position

    def take(self, count: int, what: str) -> bytearray:
        if not 0 <= count <= self.left:
            fault = f"not an importance matrix, or cut: {what} needs {count} bytes, {self.left} remain"
            raise BadFile(self.source.path, fault, "give a file of `zimage imatrix` or llama-imatrix")
        self.position += count
        return self.source.read_at(self.position - count, count)

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str, most: int) -> str:
        length = self.number(f"the length of {what}")
        if length > most:
            fault = f"not an importance matrix: {what} has {length} bytes, at most {most} are allowed"
            raise BadFile(self.source.path, fault, "give a file of `zimage imatrix` or llama-imatrix")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            fault = f"not an importance matrix: {what} is not UTF-8 text"
            raise BadFile(self.source.path, fault, AGAIN) from None


def _from_dat(source: Source) -> Content:
    reader, entries = _Reader(source), {}
    count = reader.number("the number of entries")
    if not 1 <= count <= min(MAX_ENTRIES, reader.left // 16):
        fault = (
            f"not an importance matrix: {count} entries in {source.size} bytes (the file is no GGUF either)"
        )
        raise BadFile(source.path, fault, "give a file of `zimage imatrix` or llama-imatrix")
    for i in range(count):
        name = _entry_name(source.path, reader.text(f"the name of entry {i + 1}", MAX_NAME))
        calls, width = reader.number("a number of calls"), reader.number("a number of values")
        if name in entries:
            raise BadFile(source.path, f"{printable(name, 80)} comes twice", AGAIN)
        if width < 1:
            raise BadFile(source.path, f"{printable(name, 80)} has {width} values", AGAIN)
        data = reader.take(4 * width, f"the {width} sums of {printable(name, 80)}")
        sums = torch.frombuffer(data, dtype=torch.uint8).view(torch.float32)  # little endian, as we are
        # if there are no calls, the numbers are means already
        entries[name] = Sums(_checked(source.path, name, sums), max(calls, 1))
    chunks = reader.number("the number of chunks") if reader.left else 0
    dataset = reader.text("the name of the data", MAX_DATASET) if reader.left else ""
    return entries, (printable(dataset, MAX_DATASET),) if dataset else (), max(chunks, 0)


def to_dat(entries: Mapping[str, Sums], datasets: Sequence[str], chunks: int) -> Iterator[bytes]:
    """A legacy file, in chunks of bytes: its sums are per call, a call being one chunk of the data."""
    size = _chunk_size(entries, chunks)
    yield struct.pack("<i", len(entries))
    for name, sums in entries.items():
        calls = math.ceil(sums.count / size)
        yield _short(name) + struct.pack("<ii", calls, sums.width)
        yield (sums.squares * (calls / sums.count)).float().numpy().astype("<f4").tobytes()
    yield struct.pack("<i", min(chunks, 2**31 - 1))
    yield _short(datasets[-1] if datasets else "")


def _short(text: str) -> bytes:
    # "ignore" drops a character that the cut splits
    data = text.encode("utf-8", "replace")[:MAX_DATASET].decode("utf-8", "ignore").encode()
    return struct.pack("<i", len(data)) + data
