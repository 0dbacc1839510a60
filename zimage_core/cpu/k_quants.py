"""Q2_K to Q6_K: 256 weights, sub-blocks of 16 or 32 with small integer scales under float16 ones.

One bit plane at a time: a plane is 64 or 128 bytes of a block, becomes float32 in one pass, and the
multiplication writes it to its place. Every product d * s * q fits float32's 24 bits, so rounding
happens in one place only, the subtraction of the minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.pieces import f32, floats, half, i8, nibbles, run, u8
from zimage_core.cpu.workspace import Workspace


def q2_k(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (sc & 15) * two bits - dmin * (sc >> 4), one scale byte for 16 weights."""
    n = len(blocks)
    scale, least = nibbles(run(blocks, 0, 16, work), work)
    scales = floats(scale, work).mul_(half(blocks, 80)).view(n, 2, 4, 2, 1)
    planes = out.view(n, 2, 4, 2, 16)
    raw = run(blocks, 16, 64, work)
    bits, value = work.take(u8, n, 64), work.take(f32, n, 64)
    for j in range(4):
        torch.bitwise_right_shift(raw, 2 * j, out=bits).bitwise_and_(3)
        torch.mul(value.copy_(bits).view(n, 2, 2, 16), scales[:, :, j], out=planes[:, :, j])
    out.view(n, 16, 16).sub_(floats(least, work).mul_(half(blocks, 82)).view(n, 16, 1))


def q3_k(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (s - 32) * (two bits + 4 * mask bit - 4), one six-bit s for 16 weights."""
    n = len(blocks)
    packed = run(blocks, 96, 12, work)
    scale = work.take(u8, n, 4, 4)
    low, high = packed[:, :8].view(n, 2, 4), packed[:, 8:]
    scale[:, :2], scale[:, 2:] = low & 15, low >> 4
    for j in range(4):
        scale[:, j] |= (high >> (2 * j) & 3) << 4
    scales = floats(scale.view(i8).sub_(32), work).view(n, 16).mul_(half(blocks, 108)).view(n, 2, 4, 2, 1)
    planes = out.view(n, 2, 4, 2, 16)
    mask, raw = blocks[:, :32], run(blocks, 32, 64, work)
    third = work.take(u8, n, 2, 32)  # mask bits of the four planes of either half, at bits 2 to 5
    third[:, 0] = mask << 2
    third[:, 1] = mask >> 2
    third = third.bitwise_and_(0x3C).view(n, 64)
    bits, bit, value = work.take(u8, n, 64), work.take(u8, n, 64), work.take(f32, n, 64)
    for j in range(4):
        torch.bitwise_right_shift(raw, 2 * j, out=bits).bitwise_and_(3)
        bits.bitwise_or_(torch.bitwise_right_shift(third, j, out=bit).bitwise_and_(4))
        value.copy_(bits.view(i8).sub_(4))
        torch.mul(value.view(n, 2, 2, 16), scales[:, :, j], out=planes[:, :, j])


def _scales_and_minima(blocks: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: twelve bytes at 4 hold eight six-bit scales and eight minima; float32 [n, 8] each."""
    n = len(blocks)
    a, b, c = run(blocks, 4, 12, work).view(n, 3, 4).unbind(1)
    both = work.take(u8, n, 2, 2, 4)
    torch.bitwise_and(a, 63, out=both[:, 0, 0])
    torch.bitwise_or(c & 15, a >> 2 & 48, out=both[:, 0, 1])
    torch.bitwise_and(b, 63, out=both[:, 1, 0])
    torch.bitwise_or(c >> 4, b >> 2 & 48, out=both[:, 1, 1])
    scaled = floats(both, work).view(n, 2, 8).mul_(half(blocks, 0, 2).view(n, 2, 1))
    return scaled[:, 0], scaled[:, 1]


def _affine(planes: tuple[Tensor, Tensor], blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * s * q - dmin * m, from the low-nibble and the high-nibble plane [n, 128]."""
    n = len(blocks)
    scales, minima = _scales_and_minima(blocks, work)
    paired = scales.view(n, 4, 2)
    value = work.take(f32, n, 4, 32)
    for side, plane in enumerate(planes):
        value.copy_(plane.view(n, 4, 32))
        torch.mul(value, paired[:, :, side, None], out=out.view(n, 4, 2, 32)[:, :, side])
    out.view(n, 8, 32).sub_(minima[:, :, None])


def q4_k(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * s * nibble - dmin * m, six-bit s and m for 32 weights."""
    _affine(nibbles(run(blocks, 16, 128, work), work), blocks, out, work)


def q5_k(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """As Q4_K with a fifth bit; bit 2 i + side of the mask belongs to run i."""
    n = len(blocks)
    low, high = nibbles(run(blocks, 48, 128, work), work)
    mask = run(blocks, 16, 32, work)
    fifth = work.take(u8, n, 4, 32)  # the pair of bits of run i, at bits 4 and 5
    fifth[:, 0] = mask << 4
    fifth[:, 1] = mask << 2
    fifth[:, 2] = mask
    fifth[:, 3] = mask >> 2
    fifth = fifth.view(n, 128)
    bit = torch.bitwise_and(fifth, 16, out=work.take(u8, n, 128))
    low.bitwise_or_(bit)
    high.bitwise_or_(torch.bitwise_right_shift(fifth, 1, out=bit).bitwise_and_(16))
    _affine((low, high), blocks, out, work)


def q6_k(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * sc * (six bits - 32), one int8 sc for 16 weights."""
    n = len(blocks)
    low, high = nibbles(run(blocks, 0, 128, work), work)
    mask = run(blocks, 128, 64, work).view(n, 2, 32)
    upper = work.take(u8, n, 2, 2, 32)  # bits 0-1 belong to the low nibbles, 4-5 to the high ones
    upper[:, :, 0] = mask
    torch.bitwise_right_shift(mask, 2, out=upper[:, :, 1])
    upper = upper.view(n, 128)
    bits = torch.bitwise_and(upper, 3, out=work.take(u8, n, 128))
    low.bitwise_or_(bits.bitwise_left_shift_(4))
    high.bitwise_or_(torch.bitwise_and(upper, 0x30, out=bits))
    scales = floats(blocks[:, 192:208].view(i8), work).mul_(half(blocks, 208)).view(n, 2, 2, 4, 1)
    planes = out.view(n, 2, 2, 4, 16)
    value = work.take(f32, n, 2, 4, 16)
    for side, plane in enumerate((low, high)):
        value.copy_(plane.view(i8).sub_(32).view(n, 2, 4, 16))
        torch.mul(value, scales[:, :, side], out=planes[:, :, side])
