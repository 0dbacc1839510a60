"""Helpers of the encoders: their signature, packing of bits into bytes and of fields into blocks.

They are the inverse of reference/bits.py and reference/blocks.py, in torch and on any device. Codes are uint8
[n, count], one row per block; docs/explanation/formats.md explains the layouts `planes` and `consecutive`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zimage_core.formats import BlockFormat

Encoder = Callable[[Tensor, Tensor | None], Tensor]
"""(weights float32 [n, K] contiguous, importance float32 [n, K] or [1, K] or None) -> uint8 [n, row bytes].

K is a whole number of blocks, and blocks are encoded independently of each other. An encoder minimises
sum(importance * (weights - decoded)^2), where None means ones. Finite weights give blocks that decode to
finite numbers.
"""

F16_MAX = 65504.0


def pack_planes(codes: Tensor, run: int, bits: int) -> Tensor:
    """Codes [n, m] below 2^bits -> bytes [n, m * bits / 8], in runs of `run` bytes.

    The lowest bits of a run hold its first `run` codes, the next bits hold the following ones.
    """
    count = 8 // bits
    planes = codes.view(len(codes), -1, count, run)
    packed = planes[:, :, 0].clone()
    for i in range(1, count):
        packed |= planes[:, :, i] << (bits * i)
    return packed.view(len(codes), -1)


def pack_consecutive(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] below 2^bits -> bytes [n, m * bits / 8] of neighbours, the first in the lowest bits."""
    return pack_planes(codes, 1, bits)


def to_half(values: Tensor) -> Tensor:
    """Round to float16, with magnitudes of at most 65504, so that no scale becomes infinite."""
    return values.clamp(-F16_MAX, F16_MAX).to(torch.float16)


def as_half(d: Tensor, power: Tensor) -> Tensor:
    """d [..., n] in units of `power` [n], rounded so that d * power is a finite float16."""
    return to_half(d * power).to(torch.float32) / power


def assemble(fmt: BlockFormat, **fields: Tensor) -> Tensor:
    """Fields of n blocks, [n, count] or [n] with elements of the right width -> bytes [n, nbytes]."""
    parts = []
    for field in fmt.fields:
        value = fields[field.name]
        parts.append(value.reshape(len(value), -1).contiguous().view(torch.uint8))
    return torch.cat(parts, dim=1)


def rows_of(blocks: Tensor, x: Tensor) -> Tensor:
    """Bytes [blocks, nbytes] of weights x [n, K] -> rows [n, row bytes]."""
    return blocks.view(len(x), -1)


def packed_rows(fmt: BlockFormat, x: Tensor, **fields: Tensor) -> Tensor:
    """Fields of the blocks of x [n, K] -> rows uint8 [n, row bytes]; padding blocks are dropped."""
    count = x.numel() // fmt.weights
    return rows_of(assemble(fmt, **{name: value[:count] for name, value in fields.items()}), x)
