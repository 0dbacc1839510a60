"""IQ1_S to IQ4_XS: grid indices, sign indices, small scales.

The header computes the scales and one index for four or eight weights. The body is one gather from a table of
int8 values, which include the signs if the table then still fits the second-level cache. All products fit
float32's 24 bits, so the order of the factors does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.fields import (
    column,
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
    return floats(gather_bytes("nibbles_8", blocks[:, offset : offset + count], i16, work), work).mul_(
        2.0**-8
    )


def _indices(low_bytes: Tensor, high_bits: Tensor, work: Workspace) -> Tensor:
    """low_bytes uint8 + high_bits int16 (destroyed), both [n, m], as int32."""
    high_bits.add_(low_bytes)
    return work.take(i32, *high_bits.shape).copy_(high_bits)


def _sign_words(words: Tensor, name: str, work: Workspace) -> Tensor:
    """int32 [n, 8], four 7-bit sign indices each -> the table's int16 for each, [n, 32 or 64]."""
    halves = work.take(i32, *words.shape, 2)
    halves[..., 0] = words
    halves[..., 1] = words >> 14
    return gather(name, halves.bitwise_and_(0x3FFF).view(len(words), -1), i16, work)


def _scaled(values: Tensor, scales: Tensor, out: Tensor) -> None:
    """out [n, 256] = int8 values [n, 256] * float32 scales [n, groups]."""
    out.copy_(values)
    groups = scales.numel()
    out.view(groups, -1).mul_(scales.view(groups, 1))


def iq2_xxs_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """Per 32 weights four grid bytes, then four sign indices under s: d * (1/2 + s) / 4; grid | sign << 8."""
    n = len(blocks)
    pairs = run(blocks, 2, 64, work).view(i32).view(n, 8, 2)
    grids, words = pairs[:, :, 0].contiguous(), pairs[:, :, 1].contiguous()
    scales = ((words >> 28 & 15).float() + 0.5) * (half(blocks, 0) * 0.25)
    index = _indices(grids.view(torch.uint8), _sign_words(words, "sign14_7", work), work)
    return scales, index


def iq2_xs_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (1/2 + s) / 4 for 16 weights; nine bits of grid and seven of sign in a word of the file."""
    scales = _nibble_scales(blocks, 66, 8, work).add_(0.5).mul_(half(blocks, 0) * 0.25)
    return scales, words16(run(blocks, 2, 64, work), work)


def iq2_s_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (1/2 + s) / 4 for 16 weights; ten bits of grid; eight sign bits."""
    scales = _nibble_scales(blocks, 74, 8, work).add_(0.5).mul_(half(blocks, 0) * 0.25)
    high = gather_bytes("two_bit_8", blocks[:, 66:74], i16, work)
    signs = work.take(i32, len(blocks), 32).copy_(blocks[:, 34:66])
    return scales, _indices(blocks[:, 2:34], high, work), signs


def iq3_xxs_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (1/2 + s) / 2 for 32 weights; a grid byte for four weights | four signs << 8."""
    words = run(blocks, 66, 32, work).view(i32)
    scales = ((words >> 28 & 15).float() + 0.5) * (half(blocks, 0) * 0.5)
    return scales, _indices(blocks[:, 2:66], _sign_words(words, "sign14_4", work), work)


def iq3_s_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (1 + 2 s) for 32 weights; nine bits of grid for four weights | four signs << 9."""
    scales = _nibble_scales(blocks, 106, 4, work).mul_(2).add_(1).mul_(half(blocks, 0))
    high = gather_bytes("bits_8", blocks[:, 66:74], i16, work)
    high.add_(gather_bytes("nibbles_9", blocks[:, 74:106], i16, work))
    return scales, _indices(blocks[:, 2:66], high, work)


def iq1_s_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (2 s + 1) / 8 for 32 weights; eleven bits of grid | sign of delta << 11."""
    words = words16(run(blocks, 34, 16, work), work)
    scales = ((words >> 12 & 7) * 2 + 1).float() * (half(blocks, 0) * 0.125)
    high = gather("iq1_s_high", words & 0xFFF | words >> 15 << 12, i16, work)
    return scales, _indices(blocks[:, 2:34], high, work)


def iq1_m_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """As IQ1_S with a scale for 16 weights; d is spread over the top nibbles of four words."""
    n = len(blocks)
    words = words16(run(blocks, 48, 8, work), work)
    tops = words >> 12
    pattern = tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12
    d = pattern.to(i16).view(torch.float16).float()[:, None]
    triples = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], -1).view(n, 16)
    scales = (triples * 2 + 1).float() * (d * 0.125)
    high = gather_bytes("nibbles_8", blocks[:, 32:48], i16, work)
    return scales, _indices(blocks[:, 0:32], high, work)


def iq4_xs_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """d * (s - 32), one six-bit s for 32 weights [n, 8]."""
    high = column(blocks, 2, i16).to(i32)
    upper = torch.stack([high >> 2 * j & 3 for j in range(8)], 1)
    scales = _nibble_scales(blocks, 4, 4, work).add_(upper * 16 - 32)
    return (scales.mul_(half(blocks, 0)),)


def grid_body(name: str, blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor, index: Tensor) -> None:
    """scale * value of the table `name`: grid * sign, or for IQ1 grid +- 1/8 in eighths."""
    _scaled(gather(name, index, i8, work), scales, out)


def iq2_s_body(
    blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor, index: Tensor, signs: Tensor
) -> None:
    """scale * grid * sign; grid and sign together would need a table of 2 MB."""
    values = gather("iq2_s", index, i8, work)
    _scaled(values.mul_(gather("signs8", signs, i8, work)), scales, out)


def iq4_xs_body(blocks: Tensor, out: Tensor, work: Workspace, scales: Tensor) -> None:
    """scale * level[nibble]."""
    runs = 8 * len(blocks)
    for side, plane in enumerate(nibbles(run(blocks, 8, 128, work), work)):
        value = levels("iq4_nl", plane, work).view(runs, 16)
        torch.mul(value, scales.view(runs, 1), out=out.view(runs, 2, 16)[:, side])
