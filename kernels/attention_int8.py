"""Attention whose q k^T is a product of int8 rows, with smoothed keys: SageAttention's method, arXiv 2410.02367.

Two kernels make int8 rows of q and of k, each token of a head with a scale of its own, k less its mean over the
tokens. The third goes over the keys once and keeps the running maximum and sum of softmax: scores are exact
int32 sums, softmax is float32 with powers of two, its weights are rounded to the dtype of v for the second
product, which sums in float32. No mask, no groups of heads. Multiply-adds may be fused in the third kernel.
Oracle: zimage_core.reference.attention_int8. Tests: tests/kernels/test_attention_int8.py.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from zimage_core.kernels import tiles
from zimage_core.kernels.int8 import factors, integers
from zimage_core.kernels.launch import Launch

HEADS = (32, 64, 128)
"""Channels of a head that the kernels take."""
PARTS = 16
"""Parts of the tokens whose keys are summed by different programs."""
TOKENS = 32
"""Tokens of a head that a program quantises, or sums at a time."""
ROW_WARPS = 4
"""Warps of such a program."""


class Rows(NamedTuple):
    """q and k of all heads as int8 rows; `sums` are those of k over each part of the tokens.

    Shapes: q, k int8 [B * H, L, D]; q_scale, k_scale float32 [B * H, L]; sums float32 [B * H, PARTS, D].
    `q_scale` holds what powers of two and the size of a head multiply the scores by, too.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    sums: torch.Tensor


@triton.jit
def head_of(x, member, heads, stride_b, stride_h):
    """Where head `member % heads` of sequence `member // heads` begins; 64 bits before any multiplication."""
    return x + (member // heads) * stride_b + (member % heads) * stride_h


@triton.jit(do_not_specialize=["length"])
def _sum_keys_kernel(
    k, sums,                            # [B, L, H, D], float32 [B * H, PARTS, D]
    heads, stride_b, stride_l, stride_h,
    length,
    D: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    base = head_of(k, member, heads, stride_b, stride_h)
    d = tl.arange(0, D)
    span = tl.cdiv(length, PARTS)
    stop = tl.minimum((part + 1) * span, length)
    acc = tl.zeros((TOKENS, D), tl.float32)
    for start in range(part * span, stop, TOKENS):
        n = start + tl.arange(0, TOKENS)
        at = n.to(tl.int64)[:, None] * stride_l + d[None, :]
        acc += tl.load(base + at, mask=(n < stop)[:, None], other=0.0).to(tl.float32)
    tl.store(sums + (member * PARTS + part) * D + d, tl.sum(acc, axis=0))


@triton.jit
def _store_rows(v, q, scales, member, n, length, factor, D: tl.constexpr):
    """Quantise v, float32 [TOKENS, D], to rows n of a head; the scale is multiplied by `factor`."""
    bits = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    inverse, scale = factors(bits)
    live = n < length
    row = member * length + n
    tl.store(scales + row, scale * factor, mask=live)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(q + at, integers(v, inverse[:, None]), mask=live[:, None])


@triton.jit(do_not_specialize=["length"])
def _quantize_heads_kernel(
    q, k, sums, q_out, q_scale, k_out, k_scale,  # [B, L, H, D] twice, [B * H, PARTS, D], fields of Rows
    heads, stride_b, stride_l, stride_h, stride_kb, stride_kl, stride_kh,
    length, factor,
    D: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    member = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    live = (n < length)[:, None]
    at = n.to(tl.int64)[:, None] * stride_l + d[None, :]
    v = tl.load(head_of(q, member, heads, stride_b, stride_h) + at, mask=live, other=0.0).to(tl.float32)
    _store_rows(v, q_out, q_scale, member, n, length, factor, D)
    parts = (member * PARTS + tl.arange(0, PARTS))[:, None] * D + d[None, :]
    mean = tl.div_rn(tl.sum(tl.load(sums + parts), axis=0), length.to(tl.float32))
    at = n.to(tl.int64)[:, None] * stride_kl + d[None, :]
    v = tl.load(head_of(k, member, heads, stride_kb, stride_kh) + at, mask=live, other=0.0).to(tl.float32)
    _store_rows(v - mean[None, :], k_out, k_scale, member, n, length, 1.0, D)


@triton.jit
def _attend_block(
    rows, row_scale, k, k_scale, v, stride_l, start, length, top, total, mix,
    D: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Keys start .. start + BN - 1; `top` is the largest score of a row before its own scale joins."""
    n = start + tl.arange(0, BN)
    d = tl.arange(0, D)
    if LAST:  # tokens behind the end read the last one, and weigh nothing
        place = tl.minimum(n, length - 1)
    else:
        place = n
    keys = tl.load(k + place.to(tl.int64)[None, :] * D + d[:, None])
    scores = tl.dot(rows, keys, out_dtype=tl.int32).to(tl.float32) * tl.load(k_scale + place)[None, :]
    if LAST:
        scores = tl.where((n < length)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores * row_scale[:, None] - (higher * row_scale)[:, None])
    shrink = tl.exp2((top - higher) * row_scale)
    total = total * shrink + tl.sum(weights, axis=1)
    values = tl.load(v + place.to(tl.int64)[:, None] * stride_l + d[None, :])
    weights = weights.to(values.dtype)
    mix *= shrink[:, None]
    if WIDE:
        mix = tl.dot(weights.to(tl.float32), values.to(tl.float32), mix, input_precision="ieee")
    else:
        mix = tl.dot(weights, values, mix)
    return higher, total, mix


@triton.jit(do_not_specialize=["length"])
def _attend_kernel(
    q, q_scale, k, k_scale, v, out,  # fields of Rows; [B, L, H, D]; [B, L, H * D] contiguous
    heads, stride_b, stride_l, stride_h,
    length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,              # multiply by v in float32, because the interpreter knows no bfloat16
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    member = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    place = tl.minimum(m, length - 1)  # rows behind the end read the last one, and are not stored
    rows = tl.load(q + (member * length + place)[:, None] * D + d[None, :])
    row_scale = tl.load(q_scale + member * length + place)
    k += member * length * D
    k_scale += member * length
    v = head_of(v, member, heads, stride_b, stride_h)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mix = tl.zeros((BM, D), tl.float32)
    last = (length - 1) // BN * BN
    for start in range(0, last, BN):
        top, total, mix = _attend_block(
            rows, row_scale, k, k_scale, v, stride_l, start, length, top, total, mix, D, BN, WIDE, False
        )
    top, total, mix = _attend_block(
        rows, row_scale, k, k_scale, v, stride_l, last, length, top, total, mix, D, BN, WIDE, True
    )
    mix = mix / total[:, None]
    row = (member // heads * length + m) * heads + member % heads
    at = row[:, None] * D + d[None, :]
    tl.store(out + at, mix.to(out.dtype.element_ty), mask=(m < length)[:, None])


def quantize(q: torch.Tensor, k: torch.Tensor) -> Rows:
    """q, k [B, L, H, D], float types, the last axis contiguous -> `Rows`."""
    members, length, size = q.shape[0] * q.shape[2], q.shape[1], q.shape[3]
    values = [torch.empty(members, length, size, dtype=torch.int8, device=q.device) for _ in range(2)]
    scales = [torch.empty(members, length, dtype=torch.float32, device=q.device) for _ in range(2)]
    sums = torch.empty(members, PARTS, size, dtype=torch.float32, device=q.device)
    heads = q.shape[2]
    summed, quantized = _row_launches(size)
    summed((PARTS, members), (k, sums), (heads, *k.stride()[:3]), (length,))
    quantized(
        (-(-length // TOKENS), members),
        (q, k, sums, values[0], scales[0], values[1], scales[1]),
        (heads, *q.stride()[:3], *k.stride()[:3]),
        (length, size**-0.5 * math.log2(math.e)),
    )
    return Rows(values[0], scales[0], values[1], scales[1], sums)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for each head, q k^T by int8.

    Args:
        q: [B, L, H, D], float16 or bfloat16, any strides; D is one of `HEADS`.
        k: The same shape.
        v: The same shape and dtype as q.

    Returns:
        [B, L, H * D], contiguous.
    """
    sequences, length, heads, size = q.shape
    out = torch.empty(sequences, length, heads * size, dtype=v.dtype, device=q.device)
    if out.numel():
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        rows = quantize(q, k)
        tile = tiles.attention(q.device)
        _attend_launch(size, tile)(
            (-(-length // tile.bm), sequences * heads),
            (*rows[:4], v, out),
            (heads, *v.stride()[:3]),
            (length,),
        )
    return out


@cache
def _row_launches(size: int) -> tuple[Launch, Launch]:
    constants = {"D": size, "TOKENS": TOKENS, "PARTS": PARTS}
    options = {"num_warps": ROW_WARPS, "enable_fp_fusion": False}
    return Launch(_sum_keys_kernel, constants, **options), Launch(
        _quantize_heads_kernel, constants, **options
    )


@cache
def _attend_launch(size: int, tile: tiles.Tile) -> Launch:
    constants = {"D": size, "BM": tile.bm, "BN": tile.bn, "WIDE": tiles.interpreted()}
    return Launch(
        _attend_kernel, constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True
    )
