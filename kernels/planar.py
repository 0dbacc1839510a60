"""The layout for the fused kernel: codes, high bits and scales in planes, in the order in which tiles read them.

GGUF blocks start at odd addresses and mix six-bit scales with codes; a matrix product would have to decode them
again for every tile of x. One pass per weight sorts the same bits into planes, each [.., N, ..] with the rows of
a tile next to each other:

    codes   uint8 [K / 64, N, 32]   low nibbles k, high nibbles k + 32 of each 64 (codes of 4 to 6 bits)
            uint8 [K / 32, N, 32]   whole codes (8 bits)
    two_bit uint8 [K / 128, N, 32]  two bits of k, k + 32, k + 64, k + 96 of each 128 (2 and 3 bits; 6 above the nibble)
    bits    int32 [K / 32, N]       the top bit of each of 32 weights (3 and 5 bits)
    d       int16 [K / block, N]    float16 scale of a block (bfloat16 of MXFP4's powers of two); with a minimum
                                    int32, its d in the high half
    small   int8  [K / group, N]    scale of a group under d; with a minimum int16, its scale in the high byte;
                                    int16 for the float16 scales of NVFP4

Nothing is rounded, so fused and dequantised weights are the same numbers. Q4_K grows from 4.5 to 4.625 bits.
Tests: tests/kernels/test_matmul.py.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels import tiles
from zimage_core.kernels.decode.table import DECODERS, words
from zimage_core.kernels.launch import Launch

ALIGN = 256
"""Bytes; each plane begins at a multiple of it."""


def step_weights(bits: int) -> int:
    """Weights of a row per step of the fused kernel: as many as one byte of the planes covers."""
    return 128 if bits in (2, 3, 6) else 64


class Planes(NamedTuple):
    """A weight [N, K] in planes, as described at the top of this file; planes that a format lacks are empty."""

    codes: torch.Tensor
    two_bit: torch.Tensor
    bits: torch.Tensor
    d: torch.Tensor
    small: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.numel() * plane.element_size() for plane in self)


def plane_shapes(fmt: BlockFormat, rows: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each plane of a weight [rows, width]."""
    decoder = DECODERS[fmt.name]
    bits, pair, wide = decoder.bits, decoder.affine, decoder.affine or decoder.float_small
    group = fmt.weights // decoder.groups
    runs = width // 32 if bits == 8 else width // 64 if bits >= 4 else 0
    return {
        "codes": ((runs, rows, 32), torch.uint8),
        "two_bit": ((width // 128 if bits in (2, 3, 6) else 0, rows, 32), torch.uint8),
        "bits": ((width // 32 if bits in (3, 5) else 0, rows), torch.int32),
        "d": ((width // fmt.weights, rows), torch.int32 if pair else torch.int16),
        "small": ((width // group if decoder.sub else 0, rows), torch.int16 if wide else torch.int8),
    }


def can_repack(fmt: BlockFormat, width: int) -> bool:
    """Whether rows of `width` weights of this format have a planar layout."""
    decoder = DECODERS.get(fmt.name)
    if decoder is None or not decoder.bits:
        return False
    return width % step_weights(decoder.bits) == 0 and width % fmt.weights == 0


@triton.jit
def _fold(plane, code, FIELDS: tl.constexpr, COUNT32: tl.constexpr, N, K):
    """Store codes of 8 / FIELDS bits: byte j of a group of FIELDS runs of 32 holds weight j of each run."""
    COUNT: tl.constexpr = COUNT32 // FIELDS
    tile = tl.reshape(code, (COUNT, FIELDS, 32)) << (tl.arange(0, FIELDS) * (8 // FIELDS))[None, :, None]
    group = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    per_row = K // (32 * FIELDS)
    row = group // per_row
    place = (group % per_row * N + row)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(plane + place, tl.sum(tile, 1).to(tl.uint8), mask=(row < N)[:, None])


@triton.jit(do_not_specialize=["N"])
def _repack_kernel(
    packed, codes, two_bit, bits, d, small,  # words of [N, K / WEIGHTS] blocks; the planes
    K, N,
    CODES: tl.constexpr, SCALES: tl.constexpr, WORDS: tl.constexpr, WEIGHTS: tl.constexpr,
    GROUPS: tl.constexpr, SUB: tl.constexpr, AFFINE: tl.constexpr, ZERO: tl.constexpr, LOOKUP: tl.constexpr,
    BITS: tl.constexpr, EXPONENT: tl.constexpr, FLOAT_SMALL: tl.constexpr,
    SB: tl.constexpr,                   # blocks a program, an even number
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * SB + tl.arange(0, SB)
    per_row = K // WEIGHTS
    live = block < N * per_row
    base = packed + block * WORDS
    code = CODES(base, live, packed)

    COUNT32: tl.constexpr = SB * WEIGHTS // 32
    run = tl.program_id(0).to(tl.int64) * COUNT32 + tl.arange(0, COUNT32)  # runs of 32 weights
    row = run // (K // 32)
    step = run % (K // 32)
    some = row < N
    j = tl.arange(0, 32)
    tile = tl.reshape(code, (COUNT32, 32))
    if BITS == 8:
        tl.store(codes + (step * N + row)[:, None] * 32 + j[None, :], tile.to(tl.uint8), mask=some[:, None])
    elif BITS >= 4:
        _fold(codes, code & 15, 2, COUNT32, N, K)
    if BITS == 2 or BITS == 3 or BITS == 6:
        _fold(two_bit, (code >> (BITS // 6 * 4)) & 3, 4, COUNT32, N, K)
    if BITS == 3 or BITS == 5:
        tl.store(bits + step * N + row, tl.sum((tile >> (BITS - 1)) << j[None, :], 1), mask=some)

    parts = SCALES(base, live)
    b_row = block // per_row
    b_place = block % per_row * N + b_row
    if EXPONENT:
        low = (parts[0].to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
    else:
        low = parts[0].to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    if AFFINE:
        minimum = parts[2] if SUB else parts[1]
        high = minimum.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        tl.store(d + b_place, low | (high << 16), mask=live)
    else:
        tl.store(d + b_place, low.to(tl.int16), mask=live)
    if SUB:
        group = tl.arange(0, GROUPS)
        s_place = (block % per_row * GROUPS)[:, None] + group[None, :]
        s_place = s_place * N + b_row[:, None]
        if AFFINE:
            both_scales = (parts[1] | (parts[3] << 8)).to(tl.int16)
            tl.store(small + s_place, both_scales, mask=live[:, None])
        elif FLOAT_SMALL:
            tl.store(small + s_place, parts[1].to(tl.float16).to(tl.int16, bitcast=True), mask=live[:, None])
        else:
            tl.store(small + s_place, parts[1].to(tl.int8), mask=live[:, None])


def uninitialised(fmt: BlockFormat, rows: int, width: int, device: torch.device) -> Planes:
    """Planes in one piece of memory.

    Planes of up to 1 MiB that are tensors of their own get small segments from torch's allocator, beside the one that
    was reserved for all planes under a memory budget.
    """
    places, end = [], 0
    for shape, dtype in plane_shapes(fmt, rows, width).values():
        places.append((end, end + math.prod(shape) * dtype.itemsize, dtype, shape))
        end = -(-places[-1][1] // ALIGN) * ALIGN
    piece = torch.empty(end, dtype=torch.uint8, device=device)
    return Planes(*(piece[start:stop].view(dtype).view(shape) for start, stop, dtype, shape in places))


def repack(packed: torch.Tensor, fmt: BlockFormat) -> Planes:
    """uint8 [N, row bytes] on a device -> its planes there; K must satisfy `can_repack`."""
    rows = packed.shape[0]
    width = packed.shape[1] // fmt.nbytes * fmt.weights
    planes = uninitialised(fmt, rows, width, packed.device)
    per_program = max(2, tiles.repack_weights() // fmt.weights)
    blocks = rows * width // fmt.weights
    if blocks:
        launch = _launch(fmt.name, per_program)
        launch((-(-blocks // per_program), 1), (words(packed, fmt.name), *planes), (width,), (rows,))
    return planes


@cache
def _launch(name: str, per_program: int) -> Launch:
    constants = {**repack_constants(FORMATS[name]), "SB": per_program}
    return Launch(_repack_kernel, constants, num_warps=tiles.REPACK_WARPS, enable_fp_fusion=False)


def repack_constants(fmt: BlockFormat) -> dict[str, object]:
    """The constexpr arguments of the repacking kernel that follow from the format."""
    decoder = DECODERS[fmt.name]
    return {
        **decoder.constants(fmt.name), "BITS": decoder.bits,
        "EXPONENT": decoder.exponent, "FLOAT_SMALL": decoder.float_small,
    }  # fmt: skip
