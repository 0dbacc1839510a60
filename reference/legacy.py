"""The formats with one scale a block: Q4_0 to Q8_0, the 1 and 2-bit ones, and the 4-bit floats.

Each function takes structured blocks [...] and returns float32 weights [..., weights a block].
d and m are float16 and widened to float32 first; all arithmetic is float32, in the order written.
Source: dequantize_row_* in ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from zimage_core.reference.bits import F32, consecutive, lookup, planes, spread
from zimage_core.reference.blocks import Blocks, Floats, Ints
from zimage_core.reference.numbers import e8m0_half, ue4m3_half


def _d(blocks: Blocks) -> Floats:
    """The block's scale [..., 1]."""
    d: Floats = blocks["d"].astype(F32)
    return d


def _m(blocks: Blocks) -> Floats:
    """The block's minimum [..., 1]."""
    m: Floats = blocks["m"].astype(F32)
    return m


def q4_0(blocks: Blocks) -> Floats:
    """w = d * (q - 8); q is 4 bits, low nibbles of the 16 bytes first, then their high nibbles."""
    return _d(blocks) * (planes(blocks["qs"], 16, 4).astype(F32) - 8)


def q4_1(blocks: Blocks) -> Floats:
    """w = d * q + m; q as in Q4_0."""
    return _d(blocks) * planes(blocks["qs"], 16, 4).astype(F32) + _m(blocks)


def _five_bits(blocks: Blocks) -> Ints:
    """q of Q5_0 and Q5_1: four bits as in Q4_0, the fifth of weight i is bit i of the 32 bits in qh."""
    q: Ints = planes(blocks["qs"], 16, 4) | (consecutive(blocks["qh"], 1) << 4)
    return q


def q5_0(blocks: Blocks) -> Floats:
    """w = d * (q - 16); q is 5 bits."""
    return _d(blocks) * (_five_bits(blocks).astype(F32) - 16)


def q5_1(blocks: Blocks) -> Floats:
    """w = d * q + m; q is 5 bits."""
    return _d(blocks) * _five_bits(blocks).astype(F32) + _m(blocks)


def q8_0(blocks: Blocks) -> Floats:
    """w = d * q; q is a signed byte."""
    return _d(blocks) * blocks["qs"].astype(F32)


def q1_0(blocks: Blocks) -> Floats:
    """w = d where the weight's bit is set, -d where not."""
    return _d(blocks) * (2 * consecutive(blocks["qs"], 1).astype(F32) - 1)


def q2_0(blocks: Blocks) -> Floats:
    """w = d * (q - 1); q is 2 bits, four neighbouring weights a byte."""
    return _d(blocks) * (consecutive(blocks["qs"], 2).astype(F32) - 1)


def tq1_0(blocks: Blocks) -> Floats:
    """w = d * (t - 1); t is a base-3 digit, five of them in a byte.

    A byte stands for the fraction byte / 256 = 0.t0 t1 t2 t3 t4 in base 3, so digit p is the whole
    part of 3 * frac(3^p * byte / 256). The first 32 bytes give digit 0 of each, then digit 1 of each
    and so on; then 16 bytes likewise; the 4 bytes of qh hold four digits only.
    """

    def digits(packed: Ints, count: int) -> Ints:
        powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
        fraction = packed[..., None, :] * powers  # uint8 keeps the value modulo 256
        return (fraction.astype(np.uint16) * 3 >> 8).reshape(*packed.shape[:-1], count * packed.shape[-1])

    qs, qh = blocks["qs"], blocks["qh"]
    t = np.concatenate([digits(qs[..., :32], 5), digits(qs[..., 32:], 5), digits(qh, 4)], axis=-1)
    return _d(blocks) * (t.astype(F32) - 1)


def tq2_0(blocks: Blocks) -> Floats:
    """w = d * (q - 1); q is 2 bits, in planes of 32 bytes."""
    return _d(blocks) * (planes(blocks["qs"], 32, 2).astype(F32) - 1)


def mxfp4(blocks: Blocks) -> Floats:
    """w = 2^(e - 128) * 2 * E2M1(q); q is 4 bits ordered as in Q4_0, the doubled E2M1 is the codebook."""
    return e8m0_half(blocks["e"]) * lookup("e2m1", planes(blocks["qs"], 16, 4))


def nvfp4(blocks: Blocks) -> Floats:
    """w = UE4M3(d[s]) / 2 * 2 * E2M1(q); 4 sub-blocks of 16, q is 4 bits in planes of 8 bytes."""
    return spread(ue4m3_half(blocks["d"]), 16) * lookup("e2m1", planes(blocks["qs"], 8, 4))
