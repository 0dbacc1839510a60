"""The K formats: super-blocks of 256 weights whose sub-blocks have small integer scales.

Each function takes structured blocks [...] and returns float32 weights [..., 256]. s is the
sub-block of a weight; d and dmin are float16 and widened first; float32 arithmetic as written.
Source: dequantize_row_q*_K in ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from zimage_core.reference.bits import F32, planes, spread
from zimage_core.reference.blocks import Blocks, Floats, Ints


def _steps_and_floors(blocks: Blocks, scales: Ints, mins: Ints) -> tuple[Floats, Floats]:
    """(d * scale[s], dmin * min[s]), one each a sub-block."""
    return blocks["d"].astype(F32) * scales.astype(F32), blocks["dmin"].astype(F32) * mins.astype(F32)


def q2_k(blocks: Blocks) -> Floats:
    """w = d * scale[s] * q - dmin * min[s]; 16 sub-blocks of 16, q is 2 bits in planes of 32 bytes.

    Byte s of `scales` holds the scale in its low nibble and the min in its high one.
    """
    step, floor = _steps_and_floors(blocks, blocks["scales"] & 15, blocks["scales"] >> 4)
    q = planes(blocks["qs"], 32, 2).astype(F32)
    return spread(step, 16) * q - spread(floor, 16)


def q3_k(blocks: Blocks) -> Floats:
    """w = d * (scale[s] - 32) * (q - 4); 16 sub-blocks of 16.

    q is 3 bits: two in qs, in planes of 32 bytes, and the top one in hmask, in planes of 32 bytes.
    A scale is 6 bits: four in the nibble planes of bytes 0 to 7, two in the planes of bytes 8 to 11.
    """
    packed = blocks["scales"]
    scales = planes(packed[..., :8], 8, 4) | (planes(packed[..., 8:], 4, 2) << 4)
    step: Floats = blocks["d"].astype(F32) * (scales.astype(F32) - 32)
    q = planes(blocks["qs"], 32, 2) | (planes(blocks["hmask"], 32, 1) << 2)
    weights: Floats = spread(step, 16) * (q.astype(F32) - 4)
    return weights


def _six_bit_scales_and_mins(packed: Ints) -> tuple[Ints, Ints]:
    """12 bytes -> eight scales and eight mins of 6 bits (Q4_K, Q5_K).

    Ints 0-3 and 4-7 hold scale and min of sub-blocks 0-3 in their low 6 bits. Sub-blocks 4-7 have
    their low four bits in the nibbles of bytes 8-11 and their high two in the top of bytes 0-3 and 4-7.
    """
    low, mid, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    mins = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=-1)
    return scales, mins


def q4_k(blocks: Blocks) -> Floats:
    """w = d * scale[s] * q - dmin * min[s]; 8 sub-blocks of 32, q is 4 bits in planes of 32 bytes."""
    step, floor = _steps_and_floors(blocks, *_six_bit_scales_and_mins(blocks["scales"]))
    q = planes(blocks["qs"], 32, 4).astype(F32)
    return spread(step, 32) * q - spread(floor, 32)


def q5_k(blocks: Blocks) -> Floats:
    """w = d * scale[s] * q - dmin * min[s]; as Q4_K with a fifth bit of q in qh, in planes of 32 bytes."""
    step, floor = _steps_and_floors(blocks, *_six_bit_scales_and_mins(blocks["scales"]))
    q = planes(blocks["qs"], 32, 4) | (planes(blocks["qh"], 32, 1) << 4)
    weights: Floats = spread(step, 32) * q.astype(F32) - spread(floor, 32)
    return weights


def q6_k(blocks: Blocks) -> Floats:
    """w = d * scale[s] * (q - 32); 16 sub-blocks of 16 with signed byte scales.

    q is 6 bits: four in ql, in planes of 64 bytes, two in qh, in planes of 32 bytes.
    """
    step: Floats = blocks["d"].astype(F32) * blocks["scales"].astype(F32)
    q = planes(blocks["ql"], 64, 4) | (planes(blocks["qh"], 32, 2) << 4)
    weights: Floats = spread(step, 16) * (q.astype(F32) - 32)
    return weights
