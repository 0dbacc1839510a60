"""Unpacking of small integers, shared by the dequantisers.

`[..., n]` is any number of leading axes and n bytes; results are uint8 unless stated.
"""

from __future__ import annotations

import numpy as np

from zimage_core.codebooks import codebook
from zimage_core.reference.blocks import Floats, Ints

F32 = np.float32


def planes(packed: Ints, run: int, width: int) -> Ints:
    """Fields of `width` bits, plane by plane: [..., n] -> [..., n * 8 / width].

    Ints are taken in runs of `run`. A run yields the lowest field of each of its bytes, then the
    next higher field of each, and so on. `planes(qs, 16, 4)` are the low nibbles of 16 bytes and
    then their high nibbles.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = packed.reshape(*packed.shape[:-1], packed.shape[-1] // run, 1, run)
    fields: Ints = (runs >> shifts) & np.uint8((1 << width) - 1)
    return fields.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // width)


def consecutive(packed: Ints, width: int) -> Ints:
    """Fields of `width` bits, byte by byte, lowest first: [..., n] -> [..., n * 8 / width]."""
    return planes(packed, 1, width)


def words(packed: Ints, shifts: tuple[int, ...], mask: int) -> Ints:
    """Fields of wider integers, word by word: [..., n] -> [..., n * len(shifts)], same dtype."""
    fields: Ints = (packed[..., None] >> np.array(shifts, packed.dtype)) & packed.dtype.type(mask)
    return fields.reshape(*packed.shape[:-1], packed.shape[-1] * len(shifts))


def spread(values: Floats, run: int) -> Floats:
    """Repeat each value for its run of weights: [..., n] -> [..., n * run]."""
    return np.repeat(values, run, axis=-1)


def signs(bits: Ints) -> Floats:
    """A set bit is a minus: [..., n] bytes -> [..., 8 * n] of +1 and -1, lowest bit first."""
    return 1 - 2 * consecutive(bits, 1).astype(F32)


def parity_signs(indices: Ints) -> Floats:
    """Signs of 8 weights from 7 bits: [..., n] in 0..127 -> [..., 8 * n].

    The eighth sign makes the number of minuses even. ggml stores the same as a table of 128 bytes.
    """
    low = indices.astype(np.uint8)
    parity = low ^ (low >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return signs(low | ((parity & 1) << 7))


def lookup(name: str, indices: Ints) -> Floats:
    """Rows of a codebook: [..., n] indices -> [..., n * width]."""
    book = codebook(name)
    table: Floats = np.frombuffer(book.values, np.int8).reshape(book.shape).astype(F32)
    return table[indices].reshape(*indices.shape[:-1], indices.shape[-1] * book.width)
