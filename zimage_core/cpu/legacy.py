"""The formats with one scale a block: Q4_0 to Q8_0, IQ4_NL, the 1 and 2-bit ones, and the 4-bit floats.

Blocks of 32 weights are 17 to 34 bytes long, and torch is slow on many short strided runs. The byte
operations and the conversion therefore run over all bytes, including the scales, and only the last
multiplication selects the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.fields import f32, floats, gather, gather_bytes, half, i8, i32, levels, nibbles, run, u8
from zimage_core.cpu.tables import table
from zimage_core.cpu.workspace import Workspace


def scale_header(blocks: Tensor, work: Workspace, offset: int = 0) -> tuple[Tensor, ...]:
    """d at byte `offset`."""
    return (half(blocks, offset),)


def affine_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d at byte 0, m at byte 2."""
    return half(blocks, 0), half(blocks, 2)


def q4_0_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """d * (nibble - 8)."""
    for side, plane in enumerate(nibbles(blocks, work)):
        value = floats(plane.view(i8).sub_(8), work)
        torch.mul(value[:, 2:], d, out=out[:, 16 * side : 16 * side + 16])


def q4_1_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor, m: Tensor) -> None:
    """d * nibble + m."""
    for side, plane in enumerate(nibbles(blocks, work)):
        torch.mul(floats(plane, work)[:, 4:], d, out=out[:, 16 * side : 16 * side + 16])
    out.add_(m)


def q5_0_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d, the four bytes of fifth bits."""
    return half(blocks, 0), work.take(i32, len(blocks), 4).copy_(blocks[:, 2:6])


def q5_1_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d, m, the four bytes of fifth bits."""
    return half(blocks, 0), half(blocks, 2), work.take(i32, len(blocks), 4).copy_(blocks[:, 4:8])


def _five_bits(blocks: Tensor, out: Tensor, high: Tensor, start: int, work: Workspace) -> None:
    """nibble + high [n, 32], as integers in float32; qs at byte `start`."""
    for side, plane in enumerate(nibbles(blocks, work)):
        part = slice(16 * side, 16 * side + 16)
        torch.add(floats(plane, work)[:, start:], high[:, part], out=out[:, part])


def q5_0_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor, fifth: Tensor) -> None:
    """d * (five bits - 16); the fifth bits of all 32 weights come first."""
    _five_bits(blocks, out, floats(gather("bits_high16", fifth, i8, work), work), 6, work)
    out.mul_(d)


def q5_1_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor, m: Tensor, fifth: Tensor) -> None:
    """d * five bits + m."""
    _five_bits(blocks, out, floats(gather("bits_high0", fifth, i8, work), work), 8, work)
    out.mul_(d).add_(m)


def q8_0_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """d * q."""
    torch.mul(floats(blocks.view(i8), work)[:, 2:], d, out=out)


def iq4_nl_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """d * level[nibble]."""
    for side, plane in enumerate(nibbles(blocks, work)):
        torch.mul(levels("iq4_nl", plane, work)[:, 2:], d, out=out[:, 16 * side : 16 * side + 16])


def tq1_0_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """d * (trit - 1), five trits a byte: trit p of b is the carry of 3 * (b * 3^p mod 256)."""
    power, value = work.take(u8, *blocks.shape), work.take(f32, *blocks.shape)
    for p in range(5):
        torch.mul(blocks, 3**p, out=power)
        value.copy_(power).mul_(3 / 256).floor_().sub_(1)
        torch.mul(value[:, :32], d, out=out[:, 32 * p : 32 * p + 32])
        torch.mul(value[:, 32:48], d, out=out[:, 160 + 16 * p : 176 + 16 * p])
        if p < 4:
            torch.mul(value[:, 48:52], d, out=out[:, 240 + 4 * p : 244 + 4 * p])


def tq2_0_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """d * (two bits - 1), the four fields of a run of 32 bytes one after the other."""
    n = len(blocks)
    raw, bits = run(blocks, 0, 64, work), work.take(u8, n, 64)
    for j in range(4):
        torch.bitwise_right_shift(raw, 2 * j, out=bits).bitwise_and_(3)
        out.view(2 * n, 4, 32)[:, j].copy_(bits.view(i8).sub_(1).view(2 * n, 32))
    out.mul_(d)


def q1_0_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """d or -d, one bit each."""
    value = floats(gather_bytes("bits_pm", blocks, i8, work), work)
    torch.mul(value[:, 16:], d, out=out)


def q2_0_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """d * (two bits - 1), four to a byte; blocks have 64 weights, or 128 in a fork's format."""
    value = floats(gather_bytes("two_bit", blocks, i8, work), work)
    torch.mul(value[:, 8:], d, out=out)


def mxfp4_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """2^(e - 128)."""
    return (table("e8m0_half", blocks.device).index_select(0, blocks[:, 0].to(i32))[:, None],)


def mxfp4_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """Scale * twice an E2M1 number."""
    for side, plane in enumerate(nibbles(run(blocks, 1, 16, work), work)):
        torch.mul(levels("e2m1", plane, work), d, out=out[:, 16 * side : 16 * side + 16])


def nvfp4_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """Half an unsigned E4M3 number for 16 weights [n, 4]."""
    codes = run(blocks, 0, 4, work).view(-1).to(i32)
    return (table("ue4m3_half", blocks.device).index_select(0, codes).view(-1, 4),)


def nvfp4_body(blocks: Tensor, out: Tensor, work: Workspace, d: Tensor) -> None:
    """Scale * twice an E2M1 number; nibbles in runs of eight bytes."""
    runs = 4 * len(blocks)
    for side, plane in enumerate(nibbles(run(blocks, 4, 32, work), work)):
        value = levels("e2m1", plane, work).view(runs, 8)
        torch.mul(value, d.view(runs, 1), out=out.view(runs, 2, 8)[:, side])
