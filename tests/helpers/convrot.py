"""Writes ComfyUI's int8 files from their formulae, with NumPy, json and struct alone.

Nothing of zimage_core is used, so that what it reads and writes is compared with something independent.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

TYPES = {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}


@cache
def hadamard(size: int) -> NDArray[np.float64]:
    """The regular Hadamard matrix, entry by entry: a product over the base-4 digits of row and column."""
    h4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    i, j = np.indices((size, size))
    found = np.ones((size, size))
    step = 1
    while step < size:
        found *= h4[i // step % 4, j // step % 4] / 2
        step *= 4
    return found


def turned(rows: Array, group: int) -> Array:
    """Rows [N, K] times the rotation, whose inverse is itself; in float64 inside."""
    if not group:
        return rows.astype(np.float32)
    blocks = rows.astype(np.float64).reshape(len(rows), -1, group) @ hadamard(group)
    return blocks.reshape(rows.shape).astype(np.float32)


def int8_rows(weight: Array, group: int) -> tuple[NDArray[np.int8], Array]:
    """The integers [N, K] and scales [N, 1] of a weight."""
    rotated = turned(weight, group)
    scale = (np.abs(rotated).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    return np.clip(np.rint(rotated / scale), -127, 127).astype(np.int8), scale


def dense(values: NDArray[np.int8], scale: Array, group: int) -> Array:
    """What the integers mean."""
    return turned(values.astype(np.float32) * np.float32(scale).reshape(-1, 1), group)


def layer(weight: Array, group: int) -> dict[str, NDArray]:
    """The three tensors of a layer by their endings."""
    values, scale = int8_rows(weight, group)
    stated = {"format": "int8_tensorwise"}
    if group:
        stated |= {"convrot": True, "convrot_groupsize": group}
    text = np.frombuffer(json.dumps(stated).encode(), np.uint8)
    return {"weight": values, "weight_scale": scale, "comfy_quant": text}


def tensors_of(
    state: Mapping[str, Array], quantised: Callable[[str], bool], group: int
) -> dict[str, NDArray]:
    """The tensors of a file: layers that `quantised` chooses by the name of their weight, the rest as is."""
    found: dict[str, NDArray] = {}
    for name, value in state.items():
        if quantised(name):
            stem = name.removesuffix("weight")
            found |= {stem + end: tensor for end, tensor in layer(value, group).items()}
        else:
            found[name] = value.astype(np.float32)
    return found


def write(path: Path, tensors: Mapping[str, NDArray], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries).encode()
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
