"""The I formats: indices into codebooks, super-blocks of 256 weights (IQ4_NL: blocks of 32).

Each function takes structured blocks [...] and returns float32 weights [..., weights a block].
grid[i] is a row of 4 or 8 neighbouring magnitudes; s is the sub-block of a weight; d is float16 and
widened first; float32 arithmetic. Source: dequantize_row_iq* in ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from zimage_core.reference.bits import F32, consecutive, lookup, parity_signs, planes, signs, spread, words
from zimage_core.reference.blocks import Blocks, Floats, Ints

_DELTA = F32(0.125)


def _step(blocks: Blocks, factor: Floats) -> Floats:
    """d * factor[s], one a sub-block."""
    step: Floats = blocks["d"].astype(F32) * factor
    return step


def _half_plus(scales: Ints, unit: float) -> Floats:
    """(1/2 + scale) * unit."""
    factor: Floats = (F32(0.5) + scales.astype(F32)) * F32(unit)
    return factor


def iq4_nl(blocks: Blocks) -> Floats:
    """w = d * levels[q]; q is 4 bits ordered as in Q4_0."""
    return _step(blocks, lookup("iq4_nl", planes(blocks["qs"], 16, 4)))


def iq4_xs(blocks: Blocks) -> Floats:
    """w = d * (scale[s] - 32) * levels[q]; 8 sub-blocks of 32, each ordered as in Q4_0.

    A scale is 6 bits: nibble s of scales_l and bits 2s, 2s + 1 of scales_h.
    """
    high = words(blocks["scales_h"], tuple(range(0, 16, 2)), 3)
    scales = consecutive(blocks["scales_l"], 4) | (high.astype(np.uint8) << 4)
    step = _step(blocks, scales.astype(F32) - 32)
    return spread(step, 32) * lookup("iq4_nl", planes(blocks["qs"], 16, 4))


def iq3_xxs(blocks: Blocks) -> Floats:
    """w = d * (1/2 + scale[s]) / 2 * grid[qs] * sign; 8 sub-blocks of 32, rows of 4.

    Word s of `gas` holds four 7-bit sign indices and, in its top 4 bits, the scale.
    """
    gas = blocks["gas"]
    step = _step(blocks, _half_plus(gas >> 28, 0.5))
    return spread(step, 32) * lookup("iq3_xxs", blocks["qs"]) * parity_signs(words(gas, (0, 7, 14, 21), 127))


def iq3_s(blocks: Blocks) -> Floats:
    """w = d * (1 + 2 * scale[s]) * grid[qs + 256 * qh] * sign; 8 sub-blocks of 32, rows of 4.

    Scales are consecutive nibbles, qh gives one bit an index, signs one bit a weight.
    """
    index = blocks["qs"].astype(np.uint16) | (consecutive(blocks["qh"], 1).astype(np.uint16) << 8)
    step = _step(blocks, 1 + 2 * consecutive(blocks["scales"], 4).astype(F32))
    return spread(step, 32) * lookup("iq3_s", index) * signs(blocks["signs"])


def iq2_xxs(blocks: Blocks) -> Floats:
    """w = d * (1/2 + scale[s]) / 4 * grid[index] * sign; 8 sub-blocks of 32, rows of 8.

    Sub-block s has two words: four byte indices, then four 7-bit sign indices under the 4-bit scale.
    """
    index, gas = blocks["qs"][..., 0::2], blocks["qs"][..., 1::2]
    step = _step(blocks, _half_plus(gas >> 28, 0.25))
    rows = lookup("iq2_xxs", words(index, (0, 8, 16, 24), 255))
    return spread(step, 32) * rows * parity_signs(words(gas, (0, 7, 14, 21), 127))


def iq2_xs(blocks: Blocks) -> Floats:
    """w = d * (1/2 + scale[s]) / 4 * grid[index] * sign; 16 sub-blocks of 16, rows of 8.

    A word of qs is a 9-bit index under a 7-bit sign index; scales are consecutive nibbles.
    """
    qs = blocks["qs"]
    step = _step(blocks, _half_plus(consecutive(blocks["scales"], 4), 0.25))
    return spread(step, 16) * lookup("iq2_xs", qs & 511) * parity_signs(qs >> 9)


def iq2_s(blocks: Blocks) -> Floats:
    """w = d * (1/2 + scale[s]) / 4 * grid[qs + 256 * qh] * sign; 16 sub-blocks of 16, rows of 8.

    Scales are consecutive nibbles, qh gives two bits an index, signs one bit a weight.
    """
    index = blocks["qs"].astype(np.uint16) | (consecutive(blocks["qh"], 2).astype(np.uint16) << 8)
    step = _step(blocks, _half_plus(consecutive(blocks["scales"], 4), 0.25))
    return spread(step, 16) * lookup("iq2_s", index) * signs(blocks["signs"])


def iq1_s(blocks: Blocks) -> Floats:
    """w = d * (1 + 2 * scale[s]) * (grid[index] + delta[s]); 8 sub-blocks of 32, rows of 8 of -1, 0, 1.

    Word s of qh: the high three bits of four indices, a 3-bit scale, and the sign of delta = 1/8.
    """
    qh = blocks["qh"]
    index = blocks["qs"].astype(np.uint16) | (words(qh, (0, 3, 6, 9), 7) << 8)
    step = _step(blocks, 1 + 2 * words(qh, (12,), 7).astype(F32))
    delta = np.where(qh & 0x8000, -_DELTA, _DELTA)
    return spread(step, 32) * (lookup("iq1", index) + spread(delta, 32))


def iq1_m(blocks: Blocks) -> Floats:
    """w = d * (1 + 2 * scale[s]) * (grid[index] + delta); 16 sub-blocks of 16, rows of 8 of -1, 0, 1.

    A nibble of qh a row: the high three bits of its index and the sign of its delta = 1/8. A word of
    `scales` holds four 3-bit scales and, in its top 4 bits, a quarter of the float16 d, lowest first.
    """
    scales, qh = blocks["scales"], consecutive(blocks["qh"], 4)
    quarters = (scales >> 12) << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(quarters, axis=-1, keepdims=True).view(np.float16).astype(F32)
    step = d * (1 + 2 * words(scales, (0, 3, 6, 9), 7).astype(F32))
    index = blocks["qs"].astype(np.uint16) | ((qh & 7).astype(np.uint16) << 8)
    delta = np.where(qh & 8, -_DELTA, _DELTA)
    weights: Floats = spread(step, 16) * (lookup("iq1", index) + spread(delta, 8))
    return weights
