"""Ternary, one-bit, two-bit and four-bit-float formats."""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.pieces import f32, floats, gather_bytes, half, i8, i32, levels, nibbles, run, u8
from zimage_core.cpu.tables import table
from zimage_core.cpu.workspace import Workspace


def tq1_0_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d."""
    return (half(blocks, 52),)


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


def tq2_0_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d."""
    return (half(blocks, 64),)


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
    """d * (two bits - 1), four to a byte; of 64 weights and, in a fork, of 128."""
    value = floats(gather_bytes("crumbs", blocks, i8, work), work)
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
