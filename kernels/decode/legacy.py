"""Formats with one scale a block: Q4_0 to Q8_0, IQ4_NL, the 1 and 2-bit ones, and the 4-bit floats.

Each format is a pair of functions; README.md of `kernels/` has the contract.
"""

import triton
import triton.language as tl

from zimage_core.kernels.decode.bits import at, fields, half, read, sequence, signed

_Q4_0_QS = at("Q4_0", "qs")
_Q4_1_QS = at("Q4_1", "qs")
_Q5_0_QH = at("Q5_0", "qh")
_Q5_0_QS = at("Q5_0", "qs")
_Q5_1_QH = at("Q5_1", "qh")
_Q5_1_QS = at("Q5_1", "qs")
_Q8_0_QS = at("Q8_0", "qs")
_TQ1_0_QH = at("TQ1_0", "qh")
_TQ1_0_D = at("TQ1_0", "d")
_TQ2_0_QS = at("TQ2_0", "qs")
_TQ2_0_D = at("TQ2_0", "d")
_Q1_0_QS = at("Q1_0", "qs")
_Q2_0_QS = at("Q2_0", "qs")
_Q2_0_128_QS = at("Q2_0_128", "qs")
_MXFP4_QS = at("MXFP4", "qs")
_NVFP4_QS = at("NVFP4", "qs")


@triton.jit
def q4_0_codes(base, live, table):
    """16 bytes: low nibbles are weights 0..15, high ones 16..31."""
    return fields(read(base, live, _Q4_0_QS, 8), 16, 2, 4)


@triton.jit
def q4_1_codes(base, live, table):
    """As Q4_0, in words of 4 bytes."""
    return fields(read(base, live, _Q4_1_QS, 4), 16, 4, 4)


@triton.jit
def q5_0_codes(base, live, table):
    """As Q4_0, the fifth bit of weight i is bit i of qh."""
    high = sequence(read(base, live, _Q5_0_QH, 2), 16, 1)
    return fields(read(base, live, _Q5_0_QS, 8), 16, 2, 4) | (high << 4)


@triton.jit
def q5_1_codes(base, live, table):
    """As Q5_0, in words of 4 bytes."""
    high = sequence(read(base, live, _Q5_1_QH, 1), 32, 1)
    return fields(read(base, live, _Q5_1_QS, 4), 16, 4, 4) | (high << 4)


@triton.jit
def q8_0_codes(base, live, table):
    """32 signed bytes."""
    return signed(sequence(read(base, live, _Q8_0_QS, 16), 16, 8), 8)


@triton.jit
def scale(base, live):
    """d of a block that begins with it: [SB]."""
    return (half(tl.load(base, mask=live, other=0)),)


@triton.jit
def scale_and_offset(base, live):
    """d and -m of a block that begins with the two: [SB] each; w = d * code - (-m)."""
    word = tl.load(base, mask=live, other=0)
    return half(word), half(word >> 16) * -1.0  # a minus sign is 0 - x before Triton 3.9 and loses -0


@triton.jit
def tq1_0_codes(base, live, table):
    """Digit p of a byte is (byte * 3^p mod 256) * 3 / 256: runs of 32 and of 16 bytes with five, one of 4 with four."""
    SB: tl.constexpr = base.shape[0]
    # runs of 16 weights in words of 2 bytes: ten from bytes 0..31, five from 32..47, one from 48..51
    run = tl.arange(0, 16)[:, None]
    pair = tl.arange(0, 8)[None, :]
    place = tl.where(run < 10, run % 2 * 8 + pair, tl.where(run < 15, 16 + pair, _TQ1_0_QH + pair % 2))
    digit = tl.where(run < 10, run // 2, tl.where(run < 15, run - 10, pair // 2))
    power = ((0x511B090301 >> (8 * digit).to(tl.int64)) & 255).to(tl.uint32)  # byte p is 3^p
    words = tl.load(base[:, None, None] + place[None, :, :], mask=live[:, None, None], other=0).to(tl.uint32)
    apart = (words | (words << 8)) & 0xFF00FF  # the two bytes in half a word each
    apart = ((apart * power[None, :, :]) & 0xFF00FF) * 3 >> 8
    digits = (tl.reshape(apart, (SB, 128, 1)) >> (tl.arange(0, 2) * 16).to(tl.uint32)[None, None, :]) & 3
    return tl.reshape(digits, (SB, 256)).to(tl.int32)


@triton.jit
def tq1_0_scales(base, live):
    """d after the digits."""
    return (half(tl.load(base + _TQ1_0_D, mask=live, other=0)),)


@triton.jit
def tq2_0_codes(base, live, table):
    """Four 2-bit planes in each run of 32 bytes."""
    return fields(read(base, live, _TQ2_0_QS, 32), 32, 2, 2)


@triton.jit
def tq2_0_scales(base, live):
    """d after the codes."""
    return (half(tl.load(base + _TQ2_0_D, mask=live, other=0)),)


@triton.jit
def q1_0_codes(base, live, table):
    """A bit is 1 or -1."""
    return 2 * sequence(read(base, live, _Q1_0_QS, 8), 16, 1) - 1


@triton.jit
def q2_0_codes(base, live, table):
    """Four neighbours a byte."""
    return sequence(read(base, live, _Q2_0_QS, 8), 16, 2)


@triton.jit
def q2_0_128_codes(base, live, table):
    """As Q2_0, twice as many."""
    return sequence(read(base, live, _Q2_0_128_QS, 16), 16, 2)


@triton.jit
def mxfp4_codes(base, live, table):
    """16 bytes: low nibbles are weights 0..15, high ones 16..31; they index the doubled E2M1."""
    return fields(read(base, live, _MXFP4_QS, 16), 16, 1, 4)


@triton.jit
def mxfp4_scale(base, live):
    """2^(e - 128) as the bits of a float32, subnormal for e of 0 and 1: [SB]."""
    e = tl.load(base, mask=live, other=0).to(tl.uint32)
    return (tl.where(e < 2, 0x200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True),)


@triton.jit
def nvfp4_codes(base, live, table):
    """Runs of 8 bytes of nibbles; they index the doubled E2M1."""
    return fields(read(base, live, _NVFP4_QS, 8), 8, 4, 4)


@triton.jit
def nvfp4_scales(base, live):
    """1 and UE4M3 / 2, the top bit ignored: seven bits shifted into a float16 are 2^-8 of the number; 0x7F is 0."""
    SB: tl.constexpr = base.shape[0]
    code = sequence(read(base, live, 0, 1), 32, 8)
    small = tl.where(code == 127, 0.0, half((code & 127) << 7) * 128.0)
    return tl.full((SB,), 1.0, tl.float32), small
