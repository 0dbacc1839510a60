"""IQ1_S to IQ4_XS: grid indices, sign indices, small scales.

One gather answers four or eight weights as int8, signs included where the table fits the
second-level cache. All products fit float32's 24 bits, so the order of the factors is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.pieces import (
    floats,
    gather,
    gather_bytes,
    half,
    i8,
    i16,
    i32,
    levels,
    nibbles,
    run,
    words16,
)
from zimage_core.cpu.workspace import Workspace


def _nibble_scales(blocks: Tensor, offset: int, count: int, work: Workspace) -> Tensor:
    """`count` bytes -> 2 count nibbles, low first, float32 [n, 2 count]."""
    return floats(torch.stack(nibbles(run(blocks, offset, count, work), work), -1), work).flatten(1)


def _indices(low_bytes: Tensor, high_bits: Tensor, work: Workspace) -> Tensor:
    """low_bytes uint8 + high_bits int16 (destroyed), both [n, m], as int32."""
    high_bits.add_(low_bytes)
    return work.take(i32, *high_bits.shape).copy_(high_bits)


def _scaled(values: Tensor, scales: Tensor, out: Tensor, work: Workspace) -> None:
    """out [n, 256] = int8 values [n, 256] * float32 scales [n, groups]."""
    grouped = (len(out), scales.shape[1], -1)
    torch.mul(floats(values, work).view(grouped), scales[:, :, None], out=out.view(grouped))


def _sign_words(words: Tensor, name: str, work: Workspace) -> Tensor:
    """int32 [n, 8], four 7-bit sign indices each -> the table's int16 for each, [n, 32 or 64]."""
    halves = work.take(i32, *words.shape, 2)
    halves[..., 0] = words
    torch.bitwise_right_shift(words, 14, out=halves[..., 1])
    return gather(name, halves.bitwise_and_(0x3FFF).view(len(words), -1), i16, work)


def iq2_xxs(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (1/2 + s) / 4 * grid * sign: per 32 weights four grid bytes, then four sign indices under s."""
    n = len(blocks)
    raw = run(blocks, 2, 64, work).view(n, 8, 8)
    words = raw.view(i32)[:, :, 1].contiguous()
    scales = ((words >> 28 & 15).float() + 0.5) * (half(blocks, 0) * 0.25)
    grids = raw[:, :, :4].reshape(n, 32)
    index = _indices(grids, _sign_words(words, "sign14_7", work), work)
    _scaled(gather("iq2_xxs", index, i8, work), scales, out, work)


def iq2_xs(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (1/2 + s) / 4 * grid * sign: nine bits of grid and seven of sign in a word."""
    scales = _nibble_scales(blocks, 66, 8, work).add_(0.5).mul_(half(blocks, 0) * 0.25)
    index = words16(run(blocks, 2, 64, work), work)
    _scaled(gather("iq2_xs", index, i8, work), scales, out, work)


def iq2_s(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (1/2 + s) / 4 * grid * sign: ten bits of grid, eight of sign."""
    scales = _nibble_scales(blocks, 74, 8, work).add_(0.5).mul_(half(blocks, 0) * 0.25)
    high = gather_bytes("crumbs_8", blocks[:, 66:74], i16, work)
    values = gather("iq2_s", _indices(blocks[:, 2:34], high, work), i8, work)
    values.mul_(gather_bytes("signs8", blocks[:, 34:66], i8, work))
    _scaled(values, scales, out, work)


def iq3_xxs(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (1/2 + s) / 2 * grid * sign: a grid byte for four weights, a 7-bit sign index for eight."""
    words = run(blocks, 66, 32, work).view(i32)
    scales = ((words >> 28 & 15).float() + 0.5) * (half(blocks, 0) * 0.5)
    index = _indices(blocks[:, 2:66], _sign_words(words, "sign14_4", work), work)
    _scaled(gather("iq3_xxs", index, i8, work), scales, out, work)


def iq3_s(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (1 + 2 s) * grid * sign: nine bits of grid for four weights, one sign bit each."""
    scales = _nibble_scales(blocks, 106, 4, work).mul_(2).add_(1).mul_(half(blocks, 0))
    high = gather_bytes("bits_8", blocks[:, 66:74], i16, work)
    high.add_(gather_bytes("nibbles_9", blocks[:, 74:106], i16, work))
    _scaled(gather("iq3_s", _indices(blocks[:, 2:66], high, work), i8, work), scales, out, work)


def iq1_s(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (2 s + 1) * (grid +- 1/8): the table holds eighths."""
    words = words16(run(blocks, 34, 16, work), work)
    scales = ((words >> 12 & 7) * 2 + 1).float() * (half(blocks, 0) * 0.125)
    high = gather("iq1_s_high", words & 0xFFF | words >> 15 << 12, i16, work)
    _scaled(gather("iq1", _indices(blocks[:, 2:34], high, work), i8, work), scales, out, work)


def iq1_m(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """As IQ1_S with a scale for 16 weights; d is spread over the top nibbles of four words."""
    n = len(blocks)
    words = words16(run(blocks, 48, 8, work), work)
    tops = words >> 12
    pattern = tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12
    d = pattern.to(i16).view(torch.float16).float()[:, None]
    triples = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], -1).view(n, 16)
    scales = (triples * 2 + 1).float() * (d * 0.125)
    high = gather_bytes("nibbles_8", blocks[:, 32:48], i16, work)
    _scaled(gather("iq1", _indices(blocks[:, 0:32], high, work), i8, work), scales, out, work)


def iq4_xs(blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """d * (s - 32) * level[nibble], one six-bit s for 32 weights."""
    n = len(blocks)
    scale = torch.stack(nibbles(blocks[:, 4:8], work), -1).view(n, 4, 2)
    high = blocks[:, 2:4]
    for j in range(4):
        scale[:, j] |= (high[:, j // 2, None] >> torch.tensor([0, 2]).to(scale) + 4 * (j % 2) & 3) << 4
    scales = floats(scale.view(i8).sub_(32), work).view(n, 8).mul_(half(blocks, 0))
    planes = out.view(n, 8, 2, 16)
    for side, plane in enumerate(nibbles(run(blocks, 8, 128, work), work)):
        value = levels("iq4_nl", plane, work).view(n, 8, 16)
        torch.mul(value, scales[:, :, None], out=planes[:, :, side])
