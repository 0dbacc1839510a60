"""int8 rows in the order of torch's FBGEMM, which multiplies one row of float32 by them in one operation.

It rounds x to 8 bits between its least and its largest number and reads weights in the order in which they
lie in memory: 20 GB/s a thread where `torch._int_mm` reads 15 (AVX512, VNNI). torch means to remove these
operators; `capability.packed_int8_pays` then says no, and `torch._int_mm` serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zimage_core.cpu.pool import in_parallel

ENGINE = "fbgemm"
ROWS = 4096
"""Rows that are packed at a time: FBGEMM walks down their columns, which takes twice as long for so many rows
that a line of each does not fit the second-level cache."""
Packed = tuple[Any, ...]
"""What FBGEMM made of each piece of `ROWS` rows."""


def pack(rows: Callable[[int, int], tuple[Tensor, Tensor]], count: int) -> Packed:
    """Rows of int8 numbers in FBGEMM's order, N * K bytes; they are asked for piece by piece.

    Args:
        rows: (start, stop) -> int8 [stop - start, K] and float32 [stop - start], their scales.
        count: N.

    Raises:
        RuntimeError, AttributeError: This torch has no FBGEMM.
    """
    engines = torch.backends.quantized
    before = engines.engine
    found: list[Any] = [None] * -(-count // ROWS)

    def share(start: int, stop: int) -> None:
        for first in range(start, stop, ROWS):
            values, scale = rows(first, min(first + ROWS, stop))
            zeros = torch.zeros(len(values), dtype=torch.int64)
            whole = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
            found[first // ROWS] = torch.ops.quantized.linear_prepack(whole, None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantised tensors will be removed
        engines.engine = ENGINE
        try:
            in_parallel(share, count, ROWS)
        finally:
            engines.engine = before
    return tuple(found)


def multiply(x: Tensor, packed: Packed) -> Tensor:
    """x W^T for one row float32 [1, K] -> float32 [1, N]; NaN where x has one."""
    try:
        parts = [torch.ops.quantized.linear_dynamic(x, part, False) for part in packed]
    except RuntimeError:
        if not x.isnan().any():
            raise
        return x.new_full((1, sum(part.unpack()[0].shape[0] for part in packed)), float("nan"))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
