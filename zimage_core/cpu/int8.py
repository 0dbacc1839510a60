"""Int8 rows on a CPU: made of float32 numbers or of packed blocks, and multiplied.

The arithmetic is that of `zimage_core.reference.int8`: scale = absmax / 127, rounded to nearest even. The
integers of float32 rows equal the reference's, unless a rotation comes first, whose sums round differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.capability import int8_pays
from zimage_core.cpu.dequantize import DECODERS, headers, slabs
from zimage_core.cpu.rotation import rotate_into
from zimage_core.cpu.workspace import Workspace, workspace
from zimage_core.formats import BlockFormat

LARGEST = 127.0
"""Largest magnitude of a quantised number."""
LEAST = 2.0**-100
"""Least absmax that a scale is computed from: 127 / absmax stays finite for rows of zeros."""

TILE = 1 << 19
"""Numbers that are quantised at a time: 2 MiB. Smaller tiles would fit the second-level cache, but their
calls cost more than that saves."""
EXACT_DEPTH = 1024
"""Products of int8 whose sum float32 holds exactly: 1024 * 127 * 127 < 2^24."""
CHUNK = 1 << 21
"""Weights whose block headers are decoded at once."""


CODES = {
    "Q4_0": (-8, 7, 0), "Q4_1": (0, 15, 1), "Q5_0": (-16, 15, 0), "Q5_1": (0, 31, 1), "Q8_0": (-127, 127, 0),
    "Q2_K": (0, 3, -1), "Q3_K": (-4, 3, 0), "Q4_K": (0, 15, -1), "Q5_K": (0, 31, -1), "Q6_K": (-32, 31, 0),
    "IQ4_NL": (-127, 113, 0), "IQ4_XS": (-127, 113, 0),
}  # fmt: skip
"""Format -> least and largest code, and the sign with which the block's minimum joins scale * code."""


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
    """Quantise packed rows, whose float32 values exist only for a part at a time.

    Without a rotation, rows of the formats in `CODES` are not measured. The scales of their blocks bound
    them, and are multiplied by 127 / bound before they meet the codes, so that only rounding is left to do.

    Args:
        quantised: int8 [R, K], receives the integers.
        scale: float32 [R], receives the scales.
        packed: uint8 [R, row bytes].
        fmt: Format of the rows.
        rotation: Block of the Hadamard rotation before; 0 for none.
    """
    width = max(quantised.shape[1], 1)
    if fmt.name in CODES and not rotation:
        height = max(CHUNK // width, 1)
        for start in range(0, len(packed), height):
            part = slice(start, start + height)
            _decode_scaled(quantised[part], scale[part], packed[part], fmt)
    elif len(packed):
        for start, wide in slabs(packed, fmt, max(TILE // width // 8 * 8, 8)):
            part = slice(start, start + len(wide))
            quantize_into(quantised[part], scale[part], wide, rotation)


def _decode_scaled(quantised: Tensor, scale: Tensor, packed: Tensor, fmt: BlockFormat) -> None:
    """Quantise packed rows by the bounds that the scales of their blocks give."""
    blocks, *columns = headers(packed.reshape(-1, fmt.nbytes), fmt)
    factors = [column for column in columns if column.dtype == torch.float32]
    low, high, sign = CODES[fmt.name]
    ends = [factors[0] * code for code in (low, high)]
    if sign:
        ends = [end.add_(factors[1], alpha=sign) for end in ends]
    bound = torch.maximum(ends[0].abs_(), ends[1].abs_()).view(len(packed), -1).amax(1).clamp_(min=LEAST)
    inverse = torch.full_like(bound, LARGEST).div_(bound)
    for factor in factors:
        factor.view(len(packed), -1).mul_(inverse.unsqueeze(1))
    torch.div(bound, LARGEST, out=scale)
    body, work, tile = DECODERS[fmt.name][1], workspace("int8", packed.device), max(TILE // fmt.weights, 1)
    pieces = (torch.split(each, tile) for each in (blocks, quantised.view(-1, fmt.weights), *columns))
    for piece, out, *rows in zip(*pieces, strict=True):
        work.release()
        wide = work.take(torch.float32, len(piece), fmt.weights)
        body(piece, wide, work, *rows)
        out.copy_(wide.round_())


def multiply_into(sums: Tensor, x: Tensor, weight: Tensor) -> None:
    """x W^T in int32, exactly.

    Where `torch._int_mm` is slow, or wrong because it adds pairs in int16, float32 multiplies: it holds the
    sum of 1,024 products of int8 exactly. For K = 1 `torch._int_mm` mistakes W^T for W.

    Args:
        sums: int32 [M, N], contiguous.
        x: int8 [M, K].
        weight: int8 [N, K].
    """
    if x.shape[1] > 1 and int8_pays():
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
