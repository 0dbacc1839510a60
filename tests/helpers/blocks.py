"""Packed blocks for property tests, derived from the descriptors: a new format needs no change here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.reference.blocks import Bytes, as_blocks
from zimage_core.reference.encode import finite_scales

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())

SHAPES = ((1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (1, 4), (1, 9), (9, 1))


@st.composite
def packed_rows(draw: Callable[..., Any], fmt: BlockFormat, finite: bool = True) -> Bytes:
    """Any bytes at all, uint8 [rows, n_blocks * nbytes].

    One draw of raw bytes keeps shrinking fast; `finite` then clears the top exponent bit of every
    float, so that no comparison can pass on NaN == NaN. With finite=False every pattern occurs.
    """
    rows, n_blocks = draw(st.sampled_from(SHAPES))
    size = rows * n_blocks * fmt.nbytes
    packed = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(rows, -1)
    return finite_scales(packed, fmt) if finite else packed.copy()


def six_bit_scales(fmt: BlockFormat) -> tuple[Bytes, set[float]]:
    """64 blocks of Q4_K or Q5_K with every code under every scale, and the weights that they hold.

    Sub-block j of block b has scale s = (b + 8 j) % 64 and minimum 63 - s, and holds every code.
    """
    packed = np.zeros((64, fmt.nbytes), np.uint8)
    blocks = as_blocks(packed, fmt)[:, 0]
    blocks["d"], blocks["dmin"] = 1, 1
    s = ((np.arange(64)[:, None] + 8 * np.arange(8)) % 64).astype(np.uint8)
    m = 63 - s
    low, high = slice(0, 4), slice(4, 8)
    blocks["scales"][:, 0:4] = s[:, low] | (s[:, high] >> 4 << 6)
    blocks["scales"][:, 4:8] = m[:, low] | (m[:, high] >> 4 << 6)
    blocks["scales"][:, 8:12] = (s[:, high] & 15) | (m[:, high] & 15) << 4
    i = np.arange(128, dtype=np.uint8)
    blocks["qs"] = i % 16 | (15 - i % 16) << 4
    if fmt.name == "Q5_K":
        blocks["qh"] = np.arange(32) // 16 * 255
    codes = 32 if fmt.name == "Q5_K" else 16
    return packed, {float(scale * q - (63 - scale)) for scale in range(64) for q in range(codes)}


def assert_same_bits(got: np.ndarray, wanted: np.ndarray, fmt: BlockFormat) -> None:
    """Equal shapes, equal bits of every number (signed zeros too), NaN in the same places.

    The bits of a NaN are left out: which operand's payload survives depends on the vector unit.
    """
    assert got.dtype == wanted.dtype == np.float32
    assert got.shape == wanted.shape
    wrong = (got.view(np.uint32) != wanted.view(np.uint32)) & ~(np.isnan(got) & np.isnan(wanted))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        block, weight = divmod(where[-1], fmt.weights)
        raise AssertionError(
            f"{fmt.name}: {wrong.sum()} of {wrong.size} weights differ, the first in row {where[:-1]}, "
            f"block {block}, weight {weight}: got {got[where]!r}, wanted {wanted[where]!r}"
        )
