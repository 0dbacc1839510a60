"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL: 32 weights under one scale.

The blocks are 18 to 34 bytes long, and torch pays for every short strided run. So the byte
operations and the conversion run over the whole stream, scales included, and only the last
multiplication picks the weights out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.pieces import f32, floats, gather_bytes, half, i8, levels, nibbles
from zimage_core.cpu.workspace import Workspace


def q4_0(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (nibble - 8)."""
    d = half(blocks, 0)
    for side, plane in enumerate(nibbles(blocks, work)):
        value = floats(plane.view(i8).sub_(8), work)
        torch.mul(value[:, 2:], d, out=out[:, 16 * side : 16 * side + 16])


def q4_1(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * nibble + m."""
    d = half(blocks, 0)
    for side, plane in enumerate(nibbles(blocks, work)):
        torch.mul(floats(plane, work)[:, 4:], d, out=out[:, 16 * side : 16 * side + 16])
    out.add_(half(blocks, 2))


def _five_bits(blocks: Tensor, out: Tensor, at: int, high_bits: str, work: Workspace) -> None:
    """nibble + table[bit], as integers in float32: qh at byte `at`, qs behind it."""
    high = floats(gather_bytes(high_bits, blocks[:, at : at + 4], i8, work), work)
    for side, plane in enumerate(nibbles(blocks, work)):
        part = slice(16 * side, 16 * side + 16)
        torch.add(floats(plane, work)[:, at + 4 :], high[:, part], out=out[:, part])


def q5_0(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (five bits - 16); the fifth bits of all 32 weights come first."""
    _five_bits(blocks, out, 2, "bits_high16", work)
    out.mul_(half(blocks, 0))


def q5_1(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * five bits + m."""
    _five_bits(blocks, out, 4, "bits_high0", work)
    out.mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * q."""
    value = work.take(f32, *blocks.shape).copy_(blocks.view(i8))
    torch.mul(value[:, 2:], half(blocks, 0), out=out)


def iq4_nl(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * level[nibble]."""
    d = half(blocks, 0)
    for side, plane in enumerate(nibbles(blocks, work)):
        torch.mul(levels("iq4_nl", plane, work)[:, 2:], d, out=out[:, 16 * side : 16 * side + 16])
