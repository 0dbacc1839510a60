"""Q4_0 to Q8_0 and IQ4_NL: 32 weights under one float16 scale, some with a float16 offset.

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
