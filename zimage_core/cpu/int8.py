"""Int8 rows on a CPU: made of float32 numbers or of packed blocks, and multiplied.

The arithmetic is that of `zimage_core.reference.int8`: scale = absmax / 127, rounded to nearest even. The
integers equal the reference's, unless a rotation comes first, whose sums round differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.capability import int8_pays
from zimage_core.cpu.dequantize import dequantize_into
from zimage_core.cpu.rotation import rotate_into
from zimage_core.cpu.workspace import Workspace, workspace
from zimage_core.formats import BlockFormat

LARGEST = 127.0
"""Largest magnitude of a quantised number."""
LEAST = 2.0**-100
"""Least absmax that a scale is computed from: 127 / absmax stays finite for rows of zeros."""

TILE = 1 << 18
"""Numbers that are quantised at a time: five passes over 1 MiB that stays in the second-level cache."""
EXACT_DEPTH = 1024
"""Products of int8 whose sum float32 holds exactly: 1024 * 127 * 127 < 2^24."""
CHUNK = 1 << 20
"""Weights that are decoded at a time; smaller chunks cost more calls than the cache saves."""


def quantize_into(quantised: Tensor, scale: Tensor, x: Tensor, rotation: int) -> None:
    """Quantise rows.

    Args:
        quantised: int8 [R, K], receives the integers.
        scale: float32 [R], receives the scales; not finite for a row with NaN or infinity.
        x: [R, K], a float type; it is not changed.
        rotation: Block of the Hadamard rotation before; 0 for none.
    """
    height = max(TILE // max(x.shape[1], 1), 1)
    work = workspace("int8", x.device)
    for start in range(0, len(x), height):
        part = slice(start, min(start + height, len(x)))
        work.release()
        wide = x[part]
        if wide.dtype != torch.float32 or not wide.is_contiguous():
            wide = work.take(torch.float32, *wide.shape).copy_(wide)
        _quantize(quantised[part], scale[part], wide, rotation, work)


def decode_into(quantised: Tensor, scale: Tensor, packed: Tensor, fmt: BlockFormat, rotation: int) -> None:
    """Quantise packed rows, whose float32 values exist only for a chunk at a time.

    Args:
        quantised: int8 [R, K], receives the integers.
        scale: float32 [R], receives the scales.
        packed: uint8 [R, row bytes].
        fmt: Format of the rows.
        rotation: Block of the Hadamard rotation before; 0 for none.
    """
    width = quantised.shape[1]
    height = max(CHUNK // max(width, 1), 1)
    work = workspace("int8 rows", packed.device)
    work.release()
    dense = work.take(torch.float32, min(height, len(packed)), width)
    for start in range(0, len(packed), height):
        part = slice(start, min(start + height, len(packed)))
        wide = dense[: part.stop - start]
        dequantize_into(wide, packed[part], fmt)
        quantize_into(quantised[part], scale[part], wide, rotation)


def multiply_into(sums: Tensor, x: Tensor, weight: Tensor) -> None:
    """x W^T in int32, exactly.

    Where `torch._int_mm` is slow, or wrong because it adds pairs in int16, float32 multiplies: it holds the
    sum of 1,024 products of int8 exactly.

    Args:
        sums: int32 [M, N], contiguous.
        x: int8 [M, K].
        weight: int8 [N, K].
    """
    if int8_pays():
        torch._int_mm(x, weight.t(), out=sums)
        return
    sums.zero_()
    for start in range(0, x.shape[1], EXACT_DEPTH):
        part = slice(start, start + EXACT_DEPTH)
        sums += (x[:, part].float() @ weight[:, part].float().t()).to(torch.int32)


def _quantize(quantised: Tensor, scale: Tensor, wide: Tensor, rotation: int, work: Workspace) -> None:
    """Quantise contiguous float32 rows that fit the cache."""
    scratch = work.take(torch.float32, *wide.shape)
    if rotation:
        wide = rotate_into(work.take(torch.float32, *wide.shape), wide, rotation, scratch)
    largest = torch.abs(wide, out=scratch).amax(1).clamp_(min=LEAST)
    # a number divided by a tensor would be the reciprocal times the number, rounded twice
    inverse = torch.full_like(largest, LARGEST).div_(largest)
    torch.mul(wide, inverse.unsqueeze(1), out=scratch)
    quantised.copy_(scratch.round_())
    torch.div(largest, LARGEST, out=scale)
