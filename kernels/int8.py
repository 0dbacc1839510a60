"""int8: rows quantised with one scale each, optionally rotated, and their product with int32 sums.

A row is held in registers: read or decoded, rotated, its largest magnitude found, rounded and stored once. The
arithmetic is float32 without contraction, so that integers, scales and products have the bits of the reference.
Only a rotation adds in another order. Oracle: zimage_core.reference.int8. Tests: tests/kernels/test_int8.py.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from zimage_core.formats import BlockFormat
from zimage_core.kernels import tiles
from zimage_core.kernels.decode.table import DECODERS, lookup_table, words
from zimage_core.kernels.dequantize import decoded
from zimage_core.kernels.launch import Launch

LEAST: tl.constexpr = tl.constexpr(27 << 23)
"""Bits of 2^-100, the least magnitude that a row's scale is made from."""
ROUND: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: a small number added to it is rounded to an integer, half to even, in its lowest byte."""
RUN = 2048
"""Numbers in one program of the kernel that scales sums."""
LARGEST_ROW = 1 << 14
"""Numbers of a row that a program holds."""


@triton.jit
def columns(SIZE: tl.constexpr, START: tl.constexpr):
    """Columns START .. START + SIZE - 1 as [SIZE / 16, 16]."""
    return START + tl.arange(0, SIZE // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def places(SIZE: tl.constexpr, START: tl.constexpr, G: tl.constexpr):
    """Where a tile of `spread` belongs: its columns; after a rotation the runs of 16 in a block are mirrored."""
    run = tl.arange(0, SIZE // 16)
    if G > 16:
        run = run // (G // 16) * (G // 16) + (G // 16 - 1 - run % (G // 16))
    return START + run[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def spread(v, G: tl.constexpr):
    """float32 [SIZE / 16, 16] -> the same times the regular Hadamard matrix of G, in blocks; in runs mirrored.

    H4 = J B, where J mirrors four numbers and B is half their sum less each. In a block of 4^n, J mirrors all of
    it: here the numbers of a run of 16, in `places` the runs.
    """
    RUNS: tl.constexpr = v.shape[0]
    MIRROR: tl.constexpr = 4 if G == 4 else 16
    if G:
        v = tl.reshape(v, (RUNS * 4, 4))
        v = tl.sum(v, axis=1, keep_dims=True) * 0.5 - v
    if G >= 16:
        v = tl.reshape(v, (RUNS, 4, 4))
        v = tl.sum(v, axis=1, keep_dims=True) * 0.5 - v
    if G >= 64:
        v = tl.reshape(v, (RUNS // 4, 4, 16))
        v = tl.sum(v, axis=1, keep_dims=True) * 0.5 - v
    if G >= 256:
        v = tl.reshape(v, (RUNS // 16, 4, 64))
        v = tl.sum(v, axis=1, keep_dims=True) * 0.5 - v
    if G:
        v = tl.reshape(tl.flip(tl.reshape(v, (RUNS * (16 // MIRROR), MIRROR)), 1), (RUNS, 16))
    return v


@triton.jit
def largest(v):
    """Bits of the largest magnitude; as integers NaN is above infinity, and infinity above all numbers."""
    return tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def integers(v, inverse):
    """float32 -> int8, v * inverse rounded half to even."""
    return (v * inverse + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def factors(bits):
    """Bits of a row's largest magnitude -> 127 / it, it / 127."""
    most = tl.maximum(bits, LEAST).to(tl.float32, bitcast=True)
    return tl.div_rn(127.0, most), tl.div_rn(most, 127.0)


@triton.jit
def store_row(q, scales, row, size, head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr, G: tl.constexpr):
    """Quantise a row, held in one or two tiles of `spread`, to q [rows, size] and scales [rows]."""
    bits = largest(head)
    if TAIL:
        bits = tl.maximum(bits, largest(tail))
    inverse, scale = factors(bits)
    tl.store(scales + row, scale)
    place = places(HEAD, 0, G)
    tl.store(q + row * size + place, integers(head, inverse), mask=place < size)
    if TAIL:
        place = places(TAIL, HEAD, G)
        tl.store(q + row * size + place, integers(tail, inverse), mask=place < size)


@triton.jit(do_not_specialize=["rows"])
def _quantize_kernel(
    x, q, scales,               # [rows, size], int8 [rows, size] contiguous, float32 [rows]
    size, stride,               # stride in elements
    rows,
    HEAD: tl.constexpr, TAIL: tl.constexpr,  # tiles that hold a row: size <= HEAD + TAIL
    G: tl.constexpr,            # block of the rotation or 0
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = columns(HEAD, 0)
    head = spread(tl.load(x + row * stride + col, mask=col < size, other=0.0).to(tl.float32), G)
    tail = head
    if TAIL:
        col = columns(TAIL, HEAD)
        tail = spread(tl.load(x + row * stride + col, mask=col < size, other=0.0).to(tl.float32), G)
    store_row(q, scales, row, size, head, tail, HEAD, TAIL, G)


@triton.jit
def _decode_tile(
    row, table, blocks,
    START: tl.constexpr, SIZE: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, WORDS: tl.constexpr, WEIGHTS: tl.constexpr,
    GROUPS: tl.constexpr, SUB: tl.constexpr, AFFINE: tl.constexpr, ZERO: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Weights START .. START + SIZE - 1 of a row of blocks, float32 [SIZE / 16, 16]; 0 behind its end."""
    SB: tl.constexpr = SIZE // WEIGHTS
    block = START // WEIGHTS + tl.arange(0, SB)
    live = block < blocks
    base = row + block * WORDS
    weight = decoded(base, live, table, CODES, SCALES, SB, WEIGHTS, GROUPS, SUB, AFFINE, ZERO, LOOKUP)
    weight = tl.where(live[:, None, None], weight, 0.0)
    return tl.reshape(weight, (SIZE // 16, 16))


@triton.jit(do_not_specialize=["rows"])
def _requantize_kernel(
    packed, q, scales, table,   # words, int8 [rows, size] contiguous, float32 [rows], codebook
    size,
    rows,
    CODES: tl.constexpr, SCALES: tl.constexpr, WORDS: tl.constexpr, WEIGHTS: tl.constexpr,
    GROUPS: tl.constexpr, SUB: tl.constexpr, AFFINE: tl.constexpr, ZERO: tl.constexpr, LOOKUP: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    blocks = size // WEIGHTS
    base = packed + row * blocks * WORDS
    head = _decode_tile(
        base, table, blocks, 0, HEAD, CODES, SCALES, WORDS, WEIGHTS, GROUPS, SUB, AFFINE, ZERO, LOOKUP
    )
    head = spread(head, G)
    tail = head
    if TAIL:
        tail = _decode_tile(
            base, table, blocks, HEAD, TAIL, CODES, SCALES, WORDS, WEIGHTS, GROUPS, SUB, AFFINE, ZERO, LOOKUP
        )
        tail = spread(tail, G)
    store_row(q, scales, row, size, head, tail, HEAD, TAIL, G)


@triton.jit(do_not_specialize=["M"])
def _int8_matmul_kernel(
    x, x_scale, w, w_scale, bias, y,  # int8 [M, K], [M], int8 [N, K], [N], [N] or None, [M, N] contiguous
    N, K,
    M,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOTS: tl.constexpr,
    ORDER: tl.constexpr,
    EVEN: tl.constexpr,               # whether K is a multiple of BK * DOTS
):  # fmt: skip
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    # ORDER tiles along M share their tile of w in the cache
    first = pid // (ORDER * tiles_n) * ORDER
    tall = tl.minimum(tiles_m - first, ORDER)
    inside = pid % (ORDER * tiles_n)
    m = (first + inside % tall) * BM + tl.arange(0, BM)
    n = inside // tall * BN + tl.arange(0, BN)
    # rows behind the end read the last one, and are not stored
    x_row = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    w_row = w + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K
    k = tl.arange(0, BK)
    acc = tl.full((BM, BN), 0, tl.int32)
    for i in range(tl.cdiv(K, BK * DOTS)):
        for part in tl.static_range(DOTS):
            at = (i * DOTS + part) * BK + k
            if EVEN:
                left = tl.load(x_row + at[None, :])
                right = tl.load(w_row + at[:, None])
            else:
                left = tl.load(x_row + at[None, :], mask=(at < K)[None, :], other=0)
                right = tl.load(w_row + at[:, None], mask=(at < K)[:, None], other=0)
            acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    live_m, live_n = m < M, n < N
    out = acc.to(tl.float32) * tl.load(w_scale + n, mask=live_n, other=0.0)[None, :]
    out = out * tl.load(x_scale + m, mask=live_m, other=0.0)[:, None]
    if bias is not None:
        out += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


@triton.jit(do_not_specialize=["rows"])
def _rescale_kernel(
    sums, x_scale, w_scale, bias, y,  # int32 [rows, N], [rows], [N], [N] or None, [rows, N]
    N, stride, stride_y,              # strides of rows, in elements
    rows,
    RUN: tl.constexpr,                # numbers of one program
):  # fmt: skip
    runs = tl.cdiv(N, RUN)
    row = (tl.program_id(0) // runs).to(tl.int64)
    n = tl.program_id(0) % runs * RUN + tl.arange(0, RUN)
    live = n < N
    out = tl.load(sums + row * stride + n, mask=live, other=0).to(tl.float32)
    out = out * tl.load(w_scale + n, mask=live, other=0.0) * tl.load(x_scale + row)
    if bias is not None:
        out += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row * stride_y + n, out.to(y.dtype.element_ty), mask=live)


def row_tiles(size: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that hold `size` numbers together with the least left over.

    10240 is 8192 and 2048: one tile would be 16384, of which 6144 would be computed for nothing.
    """
    whole = max(16, triton.next_power_of_2(size))
    rest = size - whole // 2
    tail = max(256, triton.next_power_of_2(rest)) if rest > 0 else 0
    return (whole, 0) if whole // 2 + tail >= whole or whole < 1024 else (whole // 2, tail)


def quantize_rows(x: torch.Tensor, rotation: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] of any float dtype and strides, rotated in blocks -> int8 [M, K], float32 scales [M]."""
    rows, size = x.shape
    q = torch.empty(rows, size, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    quantize_into(q, scales, x, rotation)
    return q, scales


def quantize_into(q: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, rotation: int = 0) -> None:
    """Fill int8 q [M, K], contiguous, and float32 scales [M] from x [M, K]."""
    rows, size = x.shape
    if rows:
        x = x if x.stride(1) == 1 else x.contiguous()
        _quantize_launch(size, rotation)((rows, 1), (x, q, scales), (size, x.stride(0)), (rows,))


def requantize_into(
    q: torch.Tensor, scales: torch.Tensor, packed: torch.Tensor, fmt: BlockFormat, rotation: int = 0
) -> None:
    """Fill int8 q [N, K], contiguous, and float32 scales [N] from packed rows: uint8 [N, row bytes] or `words`."""
    rows, size = q.shape
    if rows:
        table = lookup_table(fmt.name, packed.device)
        source = words(packed, fmt.name)
        tensors = (source, q, scales, source if table is None else table)
        _requantize_launch(fmt.name, size, rotation)((rows, 1), tensors, (size,), (rows,))


def matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int8 x [M, K] and w [N, K] with their scales [M], [N] -> sums * w_scale * x_scale + bias [M, N] in `dtype`.

    The sums are int32; the rest is float32, rounded once.
    """
    (count, width), rows = x.shape, len(w)
    y = torch.empty(count, rows, dtype=dtype, device=x.device)
    if y.numel():
        tile = tiles.int8(count, rows, x.device)
        programs = -(-count // tile.bm) * -(-rows // tile.bn)
        launch = _matmul_launch(tile, width % (tile.bk * tile.dots) == 0)
        launch((programs, 1), (x, x_scale, w, w_scale, bias, y), (rows, width), (count,))
    return y


def rescale_into(
    out: torch.Tensor,
    sums: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Fill out [M, N] from int32 sums [M, N], rows of either at any distance, as `matmul` ends."""
    rows, size = out.shape
    if out.numel():
        sizes = (size, sums.stride(0), out.stride(0))
        programs = rows * -(-size // RUN)
        _rescale_launch()((programs, 1), (sums, x_scale, w_scale, bias, out), sizes, (rows,))


@cache
def _rescale_launch() -> Launch:
    return Launch(_rescale_kernel, {"RUN": RUN}, num_warps=4, enable_fp_fusion=False)


@cache
def _quantize_launch(size: int, rotation: int) -> Launch:
    head, tail = row_tiles(size)
    constants = {"HEAD": head, "TAIL": tail, "G": block(rotation)}
    return Launch(_quantize_kernel, constants, num_warps=row_warps(head), enable_fp_fusion=False)


@cache
def _requantize_launch(name: str, size: int, rotation: int) -> Launch:
    head, tail = row_tiles(size)
    constants = {**DECODERS[name].constants(name), "HEAD": head, "TAIL": tail, "G": block(rotation)}
    return Launch(_requantize_kernel, constants, num_warps=row_warps(head), enable_fp_fusion=False)


@cache
def _matmul_launch(tile: tiles.Int8Tile, even: bool) -> Launch:
    constants = {
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "DOTS": tile.dots, "ORDER": tiles.ORDER, "EVEN": even,
    }  # fmt: skip
    return Launch(
        _int8_matmul_kernel, constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False
    )


def block(rotation: int) -> int:
    """Block of a rotation as a kernel's constant: 0 for those of one number, which change nothing."""
    return rotation if rotation > 1 else 0


def row_warps(head: int) -> int:
    """Warps of a program that holds a row: 16 numbers a thread, eight warps at most."""
    return min(8, max(1, head // 512))
