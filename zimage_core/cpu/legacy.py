"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL: 32 weights under one scale.

The blocks are 18 to 34 bytes long, and torch pays for every short strided run. So the byte
operations and the conversion run over the whole stream, scales included, and only the last
multiplication picks the weights out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.pieces import floats, gather, half, i8, i32, levels, nibbles
from zimage_core.cpu.workspace import Workspace


def scale_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d at byte 0."""
    return (half(blocks, 0),)


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
