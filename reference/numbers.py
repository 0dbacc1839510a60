"""Types without blocks: one number a weight, in the field `w`."""

from __future__ import annotations

import numpy as np

from zimage_core.reference.blocks import Blocks, Floats, Ints

F32 = np.float32


def number(blocks: Blocks) -> Floats:
    """The number itself, converted to float32.

    F32, F16, F64 and the integers. F64 and I64 round to nearest even; an F64 beyond float32 becomes infinite.
    """
    weights: Floats = blocks["w"].astype(F32)
    return weights


def bf16(blocks: Blocks) -> Floats:
    """The upper half of a float32; its lower half is zero."""
    weights: Floats = (blocks["w"].astype(np.uint32) << 16).view(F32)
    return weights


def _minifloat(code: Ints, mantissa_bits: int, bias: int) -> Floats:
    """(-1)^sign * 2^(e - bias) * (1 + m), or (-1)^sign * 2^(1 - bias) * m for e = 0; m in [0, 1)."""
    exponent = (code.astype(np.int32) & 0x7F) >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)).astype(F32) / F32(1 << mantissa_bits)
    normal = np.ldexp(1 + mantissa, exponent - bias)
    subnormal = np.ldexp(mantissa, 1 - bias)
    magnitude = np.where(exponent == 0, subnormal, normal)
    value: Floats = np.where(code & 0x80, -magnitude, magnitude).astype(F32)
    return value


def f8_e4m3(blocks: Blocks) -> Floats:
    """4 exponent bits, bias 7, no infinities: only S.1111.111 is NaN, the largest number is 448.

    Source: Micikevicius et al. 2022, arXiv 2209.05433, table 1 (torch calls it float8_e4m3fn).
    """
    code = blocks["w"]
    weights: Floats = np.where((code & 0x7F) == 0x7F, F32(np.nan), _minifloat(code, 3, 7))
    return weights


def f8_e5m2(blocks: Blocks) -> Floats:
    """5 exponent bits, bias 15, with infinities and NaN as in IEEE 754: the upper half of a float16."""
    weights: Floats = (blocks["w"].astype(np.uint16) << 8).view(np.float16).astype(F32)
    return weights


def e8m0_half(code: Ints) -> Floats:
    """2^(code - 128): the scale of MXFP4, half of its OCP value because the codebook is doubled.

    ggml has no NaN here: code 255 is 2^127.
    """
    scale: Floats = np.ldexp(F32(1), code.astype(np.int32) - 128)
    return scale


def ue4m3_half(code: Ints) -> Floats:
    """Half of an unsigned E4M3 number: the scales of NVFP4. The top bit is ignored; 0x7F is 0, not NaN."""
    scale: Floats = np.where(code == 0x7F, F32(0), _minifloat(code & 0x7F, 3, 7) / 2)
    return scale
