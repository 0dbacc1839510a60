"""Packed weights as planes of four bits, which torch multiplies by a few rows in bfloat16.

`torch._weight_int4pack_mm_for_cpu` reads nibbles with a bfloat16 scale and zero for each group of
K: w = (nibble - 8) * scale + zero, sums in float32, result in bfloat16. Codes of more than four bits are two
digits, q = 16 h + l, whose groups follow each other; x is then read twice, the second time 16-fold. A format
with groups of 16, which torch does not have, puts both digits of a group into one group of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from zimage_core.cpu.dequantize import CHUNK, DECODERS, TILE, headers
from zimage_core.cpu.pool import in_parallel
from zimage_core.cpu.workspace import workspace
from zimage_core.formats import BlockFormat

ROWS = 64
"""Rows that torch packs together; a matrix is filled up to a multiple."""
LEAST_GROUP = 32
"""Smallest group of torch's product; it also has 64, 128 and 256."""

RANGES = {
    "Q4_0": (-8, 7, 0), "Q4_1": (0, 15, 1), "Q5_0": (-16, 15, 0), "Q5_1": (0, 31, 1), "Q8_0": (-128, 127, 0),
    "Q2_K": (0, 3, -1), "Q3_K": (-4, 3, 0), "Q4_K": (0, 15, -1), "Q5_K": (0, 31, -1), "Q6_K": (-32, 31, 0),
    "IQ4_NL": (-127, 113, 0), "IQ4_XS": (-127, 113, 0), "IQ2_XXS": (-43, 43, 0), "IQ2_XS": (-43, 43, 0),
    "IQ2_S": (-43, 43, 0), "IQ3_XXS": (-62, 62, 0), "IQ3_S": (-62, 62, 0), "IQ1_S": (-9, 9, 0),
    "IQ1_M": (-9, 9, 0), "TQ1_0": (-1, 1, 0), "TQ2_0": (-1, 2, 0), "MXFP4": (-12, 12, 0),
    "NVFP4": (-12, 12, 0), "Q1_0": (-1, 1, 0), "Q2_0": (-1, 2, 0), "Q2_0_128": (-1, 2, 0),
}  # fmt: skip
"""Format -> least and largest code, and the sign with which a minimum joins scale * code (0 for none)."""


@dataclass(frozen=True)
class Layout:
    """How the weights of a format become nibbles.

    Args:
        group: Weights under one scale.
        digits: Nibbles of a weight, 1 or 2.
        middle: Code that is stored as 8, or as 8 and 8.
    """

    group: int
    digits: int
    middle: int

    @property
    def parts(self) -> int:
        """How often x is read: once for each digit, and twice where a group of 16 is filled up."""
        return max(self.digits, LEAST_GROUP // self.group)

    @property
    def packed_group(self) -> int:
        """Nibbles under one scale."""
        return max(self.group, LEAST_GROUP)

    @property
    def factors(self) -> tuple[float, ...]:
        """What x is multiplied by each time that it is read."""
        return (1.0, 16.0 if self.digits == 2 else 0.0)[: self.parts]

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of nibbles, scales and zeros for a weight."""
        return self.parts * (0.5 + 4 / self.packed_group)


def layout_of(fmt: BlockFormat) -> Layout | None:
    """The layout for a format; None for plain numbers and fp8."""
    if fmt.name not in RANGES:
        return None
    low, high, _ = RANGES[fmt.name]
    blank = torch.zeros(1, fmt.nbytes, dtype=torch.uint8)
    group = fmt.weights // _factors(headers(blank, fmt))[0].shape[1]
    if low < 0 and high <= 119:  # no code is a minimum, which needs a zero: none is needed
        return Layout(group, 1 if low >= -8 and high <= 7 else 2, 0)
    if high - low <= 15:
        return Layout(group, 1, (low + high + 1) // 2)
    return Layout(group, 2, max((low + high + 1) // 2, high - 119))


@dataclass(frozen=True)
class Planes:
    """A matrix [N, K] as nibbles.

    Args:
        nibbles: What torch packed, for N filled up to a multiple of `ROWS`.
        scales: bfloat16 [groups, N, 2], scale and zero.
        rest: What bfloat16 leaves of `scales`, in the same form; None where it is not wanted.
        layout: How weights became nibbles.
    """

    nibbles: Tensor
    scales: Tensor
    rest: Tensor | None
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(each.nbytes for each in (self.nibbles, self.scales, self.rest) if each is not None)


def pack(packed: Tensor, fmt: BlockFormat, layout: Layout, rest: bool = False, spare: int = 0) -> Planes:
    """Packed rows as nibbles.

    Args:
        packed: uint8 [N, row bytes].
        fmt: Their format.
        layout: `layout_of` the format.
        rest: Whether what bfloat16 leaves of the scales is wanted too.
        spare: Groups of weights of value zero to put behind each row.
    """
    rows, width = len(packed), packed.shape[1] // fmt.nbytes * fmt.weights
    full, group = -(-rows // ROWS) * ROWS, layout.packed_group
    depth = width * layout.parts + spare * group
    nibbles = torch.empty(full, depth // 2, dtype=torch.uint8)
    scales = torch.zeros(depth // group, full, 2, dtype=torch.bfloat16)
    left = torch.zeros_like(scales) if rest else None
    height = max(CHUNK // max(width, 1) // ROWS * ROWS, ROWS)

    def convert(start: int, stop: int) -> None:
        for first in range(start, stop, height):
            last = min(first + height, stop, rows)
            codes = torch.full((-(-(last - first) // ROWS) * ROWS, depth), 8, dtype=torch.uint8)
            factors = _decode(codes[: last - first, : width * layout.parts], packed[first:last], fmt, layout)
            _pack_into(nibbles[first : first + len(codes)], codes)
            near = factors.bfloat16()
            scales[: len(near), first:last] = near
            if left is not None:
                left[: len(near), first:last] = (factors - near.float()).bfloat16()

    in_parallel(convert, full, ROWS)
    return Planes(nibbles, scales, left, layout)


def _decode(codes: Tensor, packed: Tensor, fmt: BlockFormat, layout: Layout) -> Tensor:
    """Fill nibbles uint8 [R, K * parts] from packed rows -> scales and zeros float32 [groups, R, 2]."""
    rows = len(packed)
    blocks, *columns = headers(packed.reshape(-1, fmt.nbytes), fmt)
    found = _factors((blocks, *columns))
    scale = found[0].reshape(rows, -1).clone()
    zero = scale * layout.middle
    if sign := RANGES[fmt.name][2]:
        zero.add_(found[1].reshape(rows, -1), alpha=sign)
    # a body multiplies codes by these columns and adds or subtracts the second one
    for factor, value in zip(found, (1.0, 0.0), strict=False):
        factor.fill_(value)
    body, work = DECODERS[fmt.name][1], workspace("int4", packed.device)
    stored = torch.empty(len(blocks), fmt.weights, dtype=torch.uint8)
    shift, tile = (8 if layout.digits == 1 else 136) - layout.middle, max(TILE // fmt.weights, 1)
    for piece, out, *row in zip(
        *(torch.split(each, tile) for each in (blocks, stored, *columns)), strict=True
    ):
        work.release()
        wide = work.take(torch.float32, len(piece), fmt.weights)
        body(piece, wide, work, *row)
        out.copy_(wide.add_(shift))
    groups = stored.view(rows, -1, layout.group)
    places = codes.view(rows, -1, layout.parts, layout.group)
    if layout.digits == 2:
        places[:, :, 0] = groups & 15
        places[:, :, 1] = groups >> 4
    else:
        places[:, :, 0] = groups
    factors = torch.stack([scale, zero], 2)
    if layout.parts == 2 and layout.group == layout.packed_group:
        # each digit has a group of its own, and the first one has the zero
        factors = torch.stack([factors, torch.stack([scale, torch.zeros_like(scale)], 2)], 2)
        factors = factors.view(rows, -1, 2)
    return factors.transpose(0, 1)


def _pack_into(nibbles: Tensor, codes: Tensor) -> None:
    """Nibbles in torch's order from codes uint8 [R, depth], R a multiple of `ROWS`."""
    height = _height()
    if not height:
        nibbles.copy_(torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        return
    low, high = codes.view(-1, 2, height // 2, codes.shape[1]).unbind(1)
    nibbles.view(-1, codes.shape[1], height // 2).copy_((high << 4).bitwise_or_(low).transpose(1, 2))


@cache
def _height() -> int:
    """Rows of a block in torch's order, by its instructions; 0 where the order is another one.

    A block has a byte for each column and pair of rows that are half a block apart. torch's own conversion is
    a plain loop over 32-bit integers, five times slower.
    """
    codes = torch.arange(ROWS * 6).mul_(7).remainder_(16).to(torch.uint8).view(ROWS, 6)
    wanted = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for height in (64, 32, 16):
        low, high = codes.view(-1, 2, height // 2, 6).unbind(1)
        if torch.equal((low | high << 4).transpose(1, 2).reshape(wanted.shape), wanted):
            return height
    return 0


def _factors(header: tuple[Tensor, ...]) -> list[Tensor]:
    """Scale and, where there is one, minimum of a decoded header."""
    return [column for column in header[1:] if column.dtype == torch.float32]


class Spread:
    """x [M, K] -> what nibbles of a layout are multiplied by, bfloat16 [M, K * parts]."""

    def __init__(self, layout: Layout) -> None:
        self._group = layout.group
        factors = torch.tensor(layout.factors, dtype=torch.bfloat16)
        self._factors = factors.view(-1, 1) if layout.parts > 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K], any float type -> bfloat16 [M, K * parts]."""
        x = x.bfloat16().contiguous()
        if self._factors is None:
            return x
        # bfloat16 times 16 is exact, so that both readings are of the same x
        spread = x.view(len(x), -1, 1, self._group) * self._factors
        return spread.view(len(x), -1)


def multiply(x: Tensor, planes: Planes, scales: Tensor) -> Tensor:
    """x W^T for spread x in bfloat16 [M, K * parts], with these scales; bfloat16 [M, N filled up]."""
    return torch._weight_int4pack_mm_for_cpu(x, planes.nibbles, planes.layout.packed_group, scales)
