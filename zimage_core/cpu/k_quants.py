"""Q2_K to Q6_K: 256 weights, sub-blocks of 16 or 32 with small integer scales under float16 ones.

Each bit plane is converted directly to its position in the result; scale and minimum are applied in place
while the tile is in the cache. Every product d * s * q fits float32's 24 bits, so only the subtraction of the
minimum rounds. Views are chosen so that torch sees two axes: with three it uses short inner loops, three
times as slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.fields import (
    bytes_of_columns,
    floats,
    half,
    i8,
    i32,
    i64,
    nibbles,
    run,
    u8,
    word_columns,
)
from zimage_core.cpu.workspace import Workspace

# the same small mask in each byte of a 32-bit word
_0F, _03, _3F, _30 = 0x0F0F0F0F, 0x03030303, 0x3F3F3F3F, 0x30303030
# and of a 64-bit word
_3C = 0x3C3C3C3C3C3C3C3C


def q2_k_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (sc & 15) and dmin * (sc >> 4), one for 16 weights: [n, 16] each."""
    scale, least = nibbles(run(blocks, 0, 16, work), work)
    return floats(scale, work).mul_(half(blocks, 80)), floats(least, work).mul_(half(blocks, 82))


def q2_k_body(blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor, minima: Tensor) -> None:
    """scale * two bits - minimum."""
    n = len(blocks)
    raw, bits = run(blocks, 16, 64, work), work.take(u8, n, 64)
    for j in range(4):
        torch.bitwise_right_shift(raw, 2 * j, out=bits).bitwise_and_(3)
        out.view(2 * n, 4, 32)[:, j].copy_(bits.view(2 * n, 32))
    out.view(16 * n, 16).mul_(scales.reshape(-1, 1)).sub_(minima.reshape(-1, 1))


def q3_k_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (s - 32), a six-bit s for 16 weights [n, 16]."""
    a, b, c = word_columns(run(blocks, 96, 12, work))
    low = (a & _0F, b & _0F, a >> 4 & _0F, b >> 4 & _0F)
    six = bytes_of_columns([low[j] | (c >> 2 * j & _03) << 4 for j in range(4)], work)
    return (floats(six.view(i8).sub_(32), work).mul_(half(blocks, 108)),)


def q3_k_body(blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor) -> None:
    """scale * (two bits + 4 * mask bit - 4)."""
    n = len(blocks)
    raw, bits, bit = run(blocks, 32, 64, work), work.take(u8, n, 64), work.take(u8, n, 64)
    mask = run(blocks, 0, 32, work).view(i64)
    third = work.take(i64, n, 2, 4)  # the mask bits of the four planes of either half, at bits 2 to 5
    third[:, 0] = mask << 2
    third[:, 1] = mask >> 2
    shifted = third.bitwise_and_(_3C).view(u8).view(n, 64)
    for j in range(4):
        torch.bitwise_right_shift(raw, 2 * j, out=bits).bitwise_and_(3)
        bits.bitwise_or_(torch.bitwise_right_shift(shifted, j, out=bit).bitwise_and_(4))
        out.view(2 * n, 4, 32)[:, j].copy_(bits.view(i8).sub_(4).view(2 * n, 32))
    out.view(16 * n, 16).mul_(scales.reshape(-1, 1))


def affine_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """Q4_K and Q5_K: d * s and dmin * m from twelve bytes of six-bit numbers, [n, 8] each."""
    n = len(blocks)
    halves, a, b, c = work.take(i32, 4, n).copy_(blocks.view(i32)[:, :4].t()).unbind(0)
    six, spare = work.take(i32, 2, n, 2), work.take(i32, n)
    (scale, scale4), (least, least4) = (each.unbind(1) for each in six)  # four numbers in a word
    torch.bitwise_and(a, _3F, out=scale)
    torch.bitwise_and(b, _3F, out=least)
    torch.bitwise_and(c, _0F, out=spare)
    torch.bitwise_or(spare, a.bitwise_right_shift_(2).bitwise_and_(_30), out=scale4)
    c.bitwise_right_shift_(4).bitwise_and_(_0F)
    torch.bitwise_or(c, b.bitwise_right_shift_(2).bitwise_and_(_30), out=least4)
    factors = floats(halves.view(torch.float16).view(n, 2), work)
    columns = floats(six.view(u8), work).view(2, n, 8)
    return columns[0].mul_(factors[:, :1]), columns[1].mul_(factors[:, 1:])


def _affine(planes: tuple[Tensor, Tensor], out: Tensor, scales: Tensor, minima: Tensor) -> None:
    """scale * q - minimum, from the low-nibble and the high-nibble plane [n, 128]."""
    runs = 4 * len(out)
    for side, plane in enumerate(planes):
        out.view(runs, 2, 32)[:, side].copy_(plane.view(runs, 32))
    out.view(2 * runs, 32).mul_(scales.reshape(-1, 1)).sub_(minima.reshape(-1, 1))


def q4_k_body(blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor, minima: Tensor) -> None:
    """scale * nibble - minimum."""
    _affine(nibbles(run(blocks, 16, 128, work), work), out, scales, minima)


def q5_k_body(blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor, minima: Tensor) -> None:
    """As Q4_K with a fifth bit; bit 2 i + side of the mask belongs to run i."""
    n = len(blocks)
    low, high = nibbles(run(blocks, 48, 128, work), work)
    mask = run(blocks, 16, 32, work).view(i64)
    pairs = work.take(i64, n, 4, 4)  # the pair of bits of run i, at bits 4 and 5
    pairs[:, 0] = mask << 4
    pairs[:, 1] = mask << 2
    pairs[:, 2] = mask
    pairs[:, 3] = mask >> 2
    fifth = pairs.view(u8).view(n, 128)
    bit = torch.bitwise_and(fifth, 16, out=work.take(u8, n, 128))
    low.bitwise_or_(bit)
    high.bitwise_or_(torch.bitwise_right_shift(fifth, 1, out=bit).bitwise_and_(16))
    _affine((low, high), out, scales, minima)


def q6_k_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * sc, an int8 sc for 16 weights [n, 16]."""
    return (floats(run(blocks, 192, 16, work).view(i8), work).mul_(half(blocks, 208)),)


def q6_k_body(blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor) -> None:
    """scale * (six bits - 32)."""
    n = len(blocks)
    low, high = nibbles(run(blocks, 0, 128, work), work)
    mask = run(blocks, 128, 64, work).view(i64).view(2 * n, 4)
    pairs = work.take(i64, 2 * n, 2, 4)  # bits 0-1 belong to the low nibbles, 4-5 to the high ones
    pairs[:, 0] = mask
    pairs[:, 1] = mask >> 2
    upper = pairs.view(u8).view(n, 128)
    bits = torch.bitwise_and(upper, 3, out=work.take(u8, n, 128)).bitwise_left_shift_(4)
    low.bitwise_or_(bits)
    high.bitwise_or_(torch.bitwise_and(upper, 0x30, out=bits))
    for side, plane in enumerate((low, high)):
        out.view(2 * n, 2, 64)[:, side].copy_(plane.view(i8).sub_(32).view(2 * n, 64))
    out.view(16 * n, 16).mul_(scales.reshape(-1, 1))
