"""y = x W^T directly from the planes of a packed W, which is decoded inside the product.

W is the left operand of the dot (y^T = W x^T); as right operand, every warp along M would decode it again. A
step takes 64 or 128 weights of a row, as dots over 32. Weights are exact in float32, multiplied in x's dtype
and summed in float32. With few tiles the steps are split among programs and their sums added in a fixed order.
Oracle: float64 on the reference's weights. Tests: tests/kernels/test_matmul.py.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels import tiles
from zimage_core.kernels.decode.bits import half
from zimage_core.kernels.decode.table import DECODERS, levels
from zimage_core.kernels.launch import Launch
from zimage_core.kernels.planar import Planes, step_weights


@triton.jit(do_not_specialize=["M", "steps"])
def _matmul_kernel(
    x, codes, two_bit, bits, d, small, bias, y,  # [M, K], planes, [N], [M, N] or partial sums [splits, M, N]
    N, K, stride_x, stride_y,           # strides of rows, in elements
    M, steps,                           # steps of 32 SIDES weights for one program
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    SUB: tl.constexpr, AFFINE: tl.constexpr, ZERO: tl.constexpr,
    LOOKUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,  # sixteen levels, a byte each
    EXPONENT: tl.constexpr, FLOAT_SMALL: tl.constexpr,
    BIAS: tl.constexpr, PARTIAL: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    # ORDER tiles along N share their tile of x in the cache
    first = pid // (ORDER * tiles_m) * ORDER
    wide = tl.minimum(tiles_n - first, ORDER)
    inside = pid % (ORDER * tiles_m)
    n = (first + inside % wide) * BN + tl.arange(0, BN)
    m = (inside // wide * BM + tl.arange(0, BM)).to(tl.int64)
    j = tl.arange(0, 32)
    live_n = n < N
    live_m = m < M
    start = split * steps
    SIDES: tl.constexpr = 4 if BITS == 2 or BITS == 3 or BITS == 6 else 2
    stop = tl.minimum(start + steps, K // (32 * SIDES))
    PER: tl.constexpr = 32 // GROUP  # scales that a run of 32 weights needs
    g = tl.arange(0, PER)
    x_tile = x + m[None, :] * stride_x + j[:, None]
    acc = tl.full((BN, BM), 0.0, tl.float32)
    for i in range(start, stop):
        if SIDES == 4:
            two_bit_tile = tl.load(
                two_bit + (i * N + n)[:, None] * 32 + j[None, :], mask=live_n[:, None], other=0
            )
        for side in tl.static_range(SIDES):
            run = i * SIDES + side
            code = tl.full((BN, 32), 0, tl.int32)
            if BITS == 8:
                byte = tl.load(
                    codes + (run * N + n)[:, None] * 32 + j[None, :], mask=live_n[:, None], other=0
                )
                code = byte.to(tl.int8, bitcast=True).to(tl.int32)
            elif BITS >= 4:
                if side % 2 == 0:
                    nibbles = tl.load(
                        codes + (run // 2 * N + n)[:, None] * 32 + j[None, :], mask=live_n[:, None], other=0
                    )
                code = ((nibbles >> (side % 2 * 4)) & 15).to(tl.int32)
            if SIDES == 4:
                code |= ((two_bit_tile >> (side * 2)) & 3).to(tl.int32) << (BITS // 6 * 4)
            if BITS == 3 or BITS == 5:
                word = tl.load(bits + run * N + n, mask=live_n, other=0)
                code |= ((word[:, None] >> j[None, :]) & 1) << (BITS - 1)
            if LOOKUP:  # a load here would be made asynchronous, one copy a weight
                eight = tl.where(code < 8, LOW, HIGH) >> ((code & 7) * 8).to(tl.int64)
                level = eight.to(tl.int8).to(tl.float32)
            else:
                level = code.to(tl.float32)

            word = tl.load(d + run * 32 // BLOCK * N + n, mask=live_n, other=0)
            if EXPONENT:
                scale = (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)[:, None]
            else:
                scale = half(word)[:, None]
            if AFFINE:
                minimum = half(word >> 16)[:, None]
            if SUB:
                tiny = tl.load(
                    small + (run * PER + g[None, :]) * N + n[:, None], mask=live_n[:, None], other=0
                )
                if FLOAT_SMALL:
                    scale *= half(tiny)
                elif AFFINE:
                    scale *= (tiny & 255).to(tl.float32)
                    minimum *= (tiny.to(tl.int32) >> 8).to(tl.float32)
                else:
                    scale *= tiny.to(tl.float32)
            weight = tl.reshape(level, (BN, PER, GROUP)) * scale[:, :, None]
            if AFFINE:
                weight -= minimum[:, :, None]
            elif ZERO:
                weight -= (scale * ZERO)[:, :, None]
            weight = tl.reshape(weight, (BN, 32)).to(x.dtype.element_ty)
            x_run = tl.load(x_tile + run * 32, mask=live_m[None, :], other=0.0)
            if WIDE:
                acc = tl.dot(weight.to(tl.float32), x_run.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(weight, x_run, acc)
    if BIAS:
        acc += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
    place = m[:, None] * stride_y + n[None, :]
    if PARTIAL:
        place += split.to(tl.int64) * M * stride_y
    tl.store(y + place, tl.trans(acc).to(y.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


@triton.jit(do_not_specialize=["M", "splits"])
def _sum_kernel(
    partial, bias, y,                   # float32 [splits, M, N], [N], [M, N]
    N, M, splits,
    BIAS: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    count = M.to(tl.int64) * N
    live = i < count
    total = tl.load(partial + i, mask=live, other=0.0)
    for split in tl.static_range(1, MOST):  # loads in a loop of unknown length would wait for each other
        place = split * count + i
        total += tl.load(partial + place, mask=live & (place < splits * count), other=0.0)
    if BIAS:
        total += tl.load(bias + i % N, mask=live, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=live)


def matmul(
    x: torch.Tensor, planes: Planes, fmt: BlockFormat, rows: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K] float32, float16 or bfloat16 and a packed W [rows, K] in planes -> x W^T + bias [M, rows].

    bias [rows] of any float dtype is added in float32; the result is rounded once, to x's dtype.
    """
    count, width = x.shape
    y = torch.empty(count, rows, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    tile = tiles.matmul(count, rows, width, x.device)
    all_steps = width // step_weights(DECODERS[fmt.name].bits)
    steps = -(-all_steps // tile.splits)
    splits = -(-all_steps // steps)
    out = y if splits == 1 else torch.empty(splits, count, rows, dtype=torch.float32, device=x.device)
    wide = tiles.interpreted() or x.dtype == torch.float32
    add = x if bias is None else bias
    launch = _launch(fmt.name, tile, bias is not None and splits == 1, splits > 1, wide)
    programs = -(-count // tile.bm) * -(-rows // tile.bn)
    launch((programs, splits), (x, *planes, add, out), (rows, width, x.stride(0), rows), (count, steps))
    if splits > 1:
        size = tiles.sum_elements()
        launch = _sum_launch(bias is not None, size)
        launch((-(-y.numel() // size), 1), (out, add, y), (rows,), (count, splits))
    return y


@cache
def _launch(name: str, tile: tiles.Tile, bias: bool, partial: bool, wide: bool) -> Launch:
    constants = {
        **matmul_constants(FORMATS[name]), "BIAS": bias, "PARTIAL": partial, "WIDE": wide,
        "BM": tile.bm, "BN": tile.bn, "ORDER": tiles.ORDER,
    }  # fmt: skip
    return Launch(
        _matmul_kernel, constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True
    )


@cache
def _sum_launch(bias: bool, size: int) -> Launch:
    return Launch(_sum_kernel, {"BIAS": bias, "SIZE": size, "MOST": tiles.SPLITS}, enable_fp_fusion=True)


def matmul_constants(fmt: BlockFormat) -> dict[str, object]:
    """The constexpr arguments of the kernel that follow from the format, in the kernel's order."""
    decoder = DECODERS[fmt.name]
    low, high = levels(fmt.name) if decoder.lookup else (0, 0)
    return {
        "BITS": decoder.bits, "BLOCK": fmt.weights, "GROUP": min(32, fmt.weights // decoder.groups),
        "SUB": decoder.sub, "AFFINE": decoder.affine, "ZERO": decoder.zero, "LOOKUP": decoder.lookup,
        "LOW": low, "HIGH": high, "EXPONENT": decoder.exponent, "FLOAT_SMALL": decoder.float_small,
    }  # fmt: skip
