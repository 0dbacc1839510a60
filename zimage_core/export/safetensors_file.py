"""Computes the header of a new safetensors file, and the index of shards.

Source: https://github.com/huggingface/safetensors (README, "Format"); the reader is weights/safetensors.py.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping

from zimage_core.errors import Unsupported, printable
from zimage_core.formats import BlockFormat
from zimage_core.weights.gguf_writer import Layout
from zimage_core.weights.safetensors import DTYPES

Row = tuple[str, tuple[int, ...], BlockFormat]
"""(name, shape, type) of a tensor."""


def nbytes_of(row: Row) -> int:
    """Number of bytes of a tensor."""
    return math.prod(row[1]) * row[2].nbytes


def lay_out(metadata: Mapping[str, str], tensors: Iterable[Row]) -> Layout:
    """Lay out a safetensors file, with wide types first so that every tensor is aligned.

    Raises:
        Unsupported: safetensors has no such type.
    """
    rows = sorted(tensors, key=lambda row: -row[2].nbytes)  # stable: the given order within a type
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places, offset = {}, 0
    for row in rows:
        name, shape, fmt = row
        if fmt.name not in DTYPES:
            raise Unsupported(
                f"{printable(name, 120)} is stored as {fmt.name}, which safetensors cannot hold; "
                "dequantise it (--dequantize bf16 or f32) or write a GGUF"
            )
        nbytes = nbytes_of(row)
        entries[name] = {"dtype": fmt.name, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        places[name] = (offset, nbytes)
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return Layout(
        header, {name: (len(header) + at, size) for name, (at, size) in places.items()}, len(header) + offset
    )


def shards(tensors: Iterable[Row], limit: int) -> list[list[Row]]:
    """Divide tensors, in order, into parts of at most `limit` bytes; a larger tensor gets its own part."""
    found: list[list[Row]] = [[]]
    filled = 0
    for row in tensors:
        if found[-1] and filled + nbytes_of(row) > limit:
            found.append([])
            filled = 0
        found[-1].append(row)
        filled += nbytes_of(row)
    return found


def shard_name(stem: str, number: int, count: int) -> str:
    """Hugging Face's name of a shard, counted from 1; a single file has no number."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def index_text(stem: str, parts: list[list[Row]]) -> str:
    """The index that names the shard of each tensor, as JSON."""
    weight_map = {
        row[0]: shard_name(stem, number, len(parts)) for number, part in enumerate(parts, 1) for row in part
    }
    total = sum(nbytes_of(row) for part in parts for row in part)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
