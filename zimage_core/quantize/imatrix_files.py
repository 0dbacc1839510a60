"""llama.cpp's two files of importance matrices, read without trust.

GGUF (since July 2025): `general.type` "imatrix", keys `imatrix.*`, and for each weight matrix the sums of
squares `NAME.in_sum2` [K] and the rows that went into them, `NAME.counts` [1], float32. Ours has two tensors
more, `NAME.in_sum2_levels` [bins, K] and `NAME.counts_levels` [bins, 1], with the key `zimage.imatrix.edges`:
llama.cpp's reader looks at the ends of names, takes .in_sum2 and .counts and passes over the rest, so one
file serves both. (Arrays among the keys would be skipped too, but reading any key walks through all of them.)

Legacy: counts and lengths as int32, per matrix the sums times ncall / rows; then the number of chunks and the
name of the data, which older files lack.

Source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
MAX_LEVELS = 1024
PREFIX = "model.diffusion_model."
"""What stable-diffusion.cpp puts before the names of a single file."""
SUMS, COUNTS, LEVEL_SUMS, LEVEL_COUNTS = ".in_sum2", ".counts", ".in_sum2_levels", ".counts_levels"
KIND, DATASETS = "general.type", "imatrix.datasets"
CHUNKS, CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
EDGES = "zimage.imatrix.edges"


@dataclass(frozen=True)
class Sums:
    """What was seen of the inputs of one matrix.

    Args:
        squares: Sum over rows of x^2, float64 [K].
        count: Rows.
        by_level: The same by bins of noise level, float64 [bins, K]; None for what does not depend on it.
        level_counts: Rows of each bin, int64 [bins].
    """

    squares: Tensor
    count: int
    by_level: Tensor | None = None
    level_counts: Tensor | None = None

    @property
    def width(self) -> int:
        """Input channels K."""
        return len(self.squares)

    def without_levels(self) -> Sums:
        """The totals alone."""
        return Sums(self.squares, self.count)

    def __add__(self, other: Sums) -> Sums:
        total = Sums(self.squares + other.squares, self.count + other.count)
        if self.by_level is None or self.level_counts is None:
            return total
        if other.by_level is None or other.level_counts is None:
            return total
        levels, counts = self.by_level + other.by_level, self.level_counts + other.level_counts
        return Sums(total.squares, total.count, levels, counts)


@dataclass(frozen=True)
class Content:
    """What a file holds; see `imatrix.Imatrix`."""

    entries: Mapping[str, Sums]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    edges: tuple[float, ...] = field(default=())

    @property
    def chunk_size(self) -> int:
        """Rows that one chunk brings to the matrix that sees the most."""
        most = max((sums.count for sums in self.entries.values()), default=0)
        return max(1, math.ceil(most / max(1, self.chunks)))


def read(path: str | os.PathLike[str]) -> Content:
    """A file of either kind.

    Raises:
        BadFile: Damaged, cut, or something else.
        WrongModel: A GGUF file without importances.
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
    edges = _edges(file)
    entries: dict[str, Sums] = {}
    for name in names:
        short = _entry_name(file.path, name)
        if short in entries:
            raise BadFile(file.path, f"{printable(short, 80)} comes twice", AGAIN)
        entries[short] = _gguf_entry(file, name, len(edges) + 1)
    datasets = file.metadata.get(DATASETS, ())
    texts = tuple(printable(item, MAX_DATASET) for item in datasets) if not isinstance(datasets, str) else ()
    chunks = file.metadata.get(CHUNKS, 0)
    return Content(entries, texts, max(chunks, 0) if isinstance(chunks, int) else 0, edges)


def _edges(file: GGUFFile) -> tuple[float, ...]:
    edges = file.metadata.get(EDGES, ())
    if isinstance(edges, (str, int, float)) or len(edges) >= MAX_LEVELS:
        raise BadFile(file.path, f"{EDGES} is not a list of noise levels", AGAIN)
    numbers = tuple(float(edge) if isinstance(edge, (int, float)) else math.nan for edge in edges)
    if not all(a < b for a, b in zip((-math.inf, *numbers), (*numbers, math.inf), strict=True)):
        raise BadFile(file.path, f"{EDGES} does not rise", AGAIN)
    return numbers


def _gguf_entry(file: GGUFFile, name: str, bins: int) -> Sums:
    squares = _floats(file, name + SUMS)
    counts = _counts(file, name + COUNTS, 1)
    if squares.numel() != squares.shape[-1]:
        fault = f"{printable(name, 80)} has sums of the shape {list(squares.shape)}: matrices of experts"
        raise BadFile(file.path, fault, "no model of this library has experts; give an imatrix of Z-Image")
    total = Sums(_checked(file.path, name, squares.flatten()), int(counts[0]))
    if name + LEVEL_SUMS not in file.tensors:
        return total
    levels = _floats(file, name + LEVEL_SUMS)
    if tuple(levels.shape) != (bins, total.width):
        fault = (
            f"{printable(name + LEVEL_SUMS, 80)} has the shape {list(levels.shape)}, "
            f"{[bins, total.width]} is wanted"
        )
        raise BadFile(file.path, fault, "collect it again")
    level_counts = _counts(file, name + LEVEL_COUNTS, bins)
    return Sums(total.squares, total.count, _checked(file.path, name, levels), level_counts)


def _floats(file: GGUFFile, name: str) -> Tensor:
    info = file.tensors.get(name)
    if info is None or info.format.name != "F32":
        found = "is missing" if info is None else f"is {info.format.name}"
        raise BadFile(file.path, f"{printable(name, 80)} {found}, F32 is wanted", "collect it again")
    return file.tensor(name).dequantize(torch.float32)


def _counts(file: GGUFFile, name: str, wanted: int) -> Tensor:
    """Numbers of rows, int64 [wanted]."""
    counts = _floats(file, name).flatten()
    if len(counts) != wanted:
        fault = f"{printable(name, 80)} has {len(counts)} counts, {wanted} wanted (matrices of experts?)"
        raise BadFile(file.path, fault, "give an imatrix of this model")
    return _checked(file.path, name, counts).clamp_max(2.0**53).round().long()


def to_gguf(content: Content) -> Iterator[bytes]:
    """The chunks of a GGUF file of importances."""
    keys: dict[str, Any] = {
        KIND: "imatrix",
        DATASETS: gguf_writer.TypedArray(map(_sound, content.datasets), "string"),
        CHUNKS: min(content.chunks, 2**32 - 1),
        CHUNK_SIZE: min(content.chunk_size, 2**32 - 1),
    }
    if content.edges:
        keys[EDGES] = gguf_writer.TypedArray(content.edges, "f64")
    tensors = dict(_tensors(content))
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
    """A name that can be written as UTF-8, of a length that is read again."""
    return name[:MAX_DATASET].encode("utf-8", "replace").decode()


def _tensors(content: Content) -> Iterator[tuple[str, Tensor]]:
    for name, sums in content.entries.items():
        yield name + SUMS, sums.squares[None]
        yield name + COUNTS, torch.tensor([[sums.count]])
        if content.edges and sums.by_level is not None and sums.level_counts is not None:
            yield name + LEVEL_SUMS, sums.by_level
            yield name + LEVEL_COUNTS, sums.level_counts[:, None]


# --- legacy --------------------------------------------------------------------------


class _Reader:
    """A position in the file; every length is compared with what is left before it is used."""

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
        # without calls the numbers are means already
        entries[name] = Sums(_checked(source.path, name, sums), max(calls, 1))
    chunks = reader.number("the number of chunks") if reader.left else 0
    dataset = reader.text("the name of the data", MAX_DATASET) if reader.left else ""
    return Content(entries, (printable(dataset, MAX_DATASET),) if dataset else (), max(chunks, 0))


def to_dat(content: Content) -> Iterator[bytes]:
    """The chunks of a legacy file: sums per call, a call being a chunk."""
    size = content.chunk_size
    yield struct.pack("<i", len(content.entries))
    for name, sums in content.entries.items():
        calls = math.ceil(sums.count / size)
        yield _short(name) + struct.pack("<ii", calls, sums.width)
        yield (sums.squares * (calls / sums.count)).float().numpy().astype("<f4").tobytes()
    yield struct.pack("<i", min(content.chunks, 2**31 - 1))
    yield _short(content.datasets[-1] if content.datasets else "")


def _short(text: str) -> bytes:
    # no character is cut in the middle
    data = text.encode("utf-8", "replace")[:MAX_DATASET].decode("utf-8", "ignore").encode()
    return struct.pack("<i", len(data)) + data
