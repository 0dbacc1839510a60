"""Q2_K to Q6_K and IQ4_XS: 256 weights, groups of 16 or 32 with small integer scales under float16 ones.

Each format is a pair of functions; README.md of `kernels/` has the contract.
"""

import triton
import triton.language as tl

from zimage_core.kernels.decode.bits import at, fields, half, read, sequence, signed

_Q2_K_QS = at("Q2_K", "qs")
_Q2_K_D = at("Q2_K", "d")
_Q3_K_HMASK = at("Q3_K", "hmask")
_Q3_K_QS = at("Q3_K", "qs")
_Q3_K_SCALES = at("Q3_K", "scales")
_Q3_K_D = at("Q3_K", "d")
_Q4_K_SCALES = at("Q4_K", "scales")
_Q4_K_QS = at("Q4_K", "qs")
_Q5_K_QH = at("Q5_K", "qh")
_Q5_K_QS = at("Q5_K", "qs")
_Q6_K_QL = at("Q6_K", "ql")
_Q6_K_QH = at("Q6_K", "qh")
_Q6_K_SCALES = at("Q6_K", "scales")
_Q6_K_D = at("Q6_K", "d")
_IQ4_XS_SCALES_L = at("IQ4_XS", "scales_l")
_IQ4_XS_QS = at("IQ4_XS", "qs")


@triton.jit
def q2_k_codes(base, live, table):
    """Four 2-bit planes in each run of 32 bytes."""
    return fields(read(base, live, _Q2_K_QS, 16), 32, 4, 2)


@triton.jit
def q2_k_scales(base, live):
    """Scale and minimum of 16 weights are the nibbles of a byte; d and dmin follow the codes."""
    pairs = sequence(read(base, live, 0, 4), 32, 8)
    word = tl.load(base + _Q2_K_D, mask=live, other=0)
    return half(word), pairs & 15, half(word >> 16), pairs >> 4


@triton.jit
def q3_k_codes(base, live, table):
    """2-bit planes as in Q2_K; plane j of hmask is the third bit of weights 32 j .. 32 j + 31."""
    high = fields(read(base, live, _Q3_K_HMASK, 16), 32, 2, 1)
    return fields(read(base, live, _Q3_K_QS, 32), 32, 2, 2) | (high << 2)


@triton.jit
def q3_k_scales(base, live):
    """Six bits less 32: the low nibble of scale i is in byte i % 8, the high bits in byte 8 + i % 4."""
    i = tl.arange(0, 16)[None, :]
    words = base[:, None] + _Q3_K_SCALES
    low = tl.load(words + i % 8 // 2, mask=live[:, None], other=0).to(tl.int32) >> (i % 2 * 8 + i // 8 * 4)
    high = tl.load(words + 4 + i % 4 // 2, mask=live[:, None], other=0).to(tl.int32) >> (
        i % 2 * 8 + i // 4 * 2
    )
    d = half(tl.load(base + _Q3_K_D, mask=live, other=0))
    return d, ((low & 15) | ((high & 3) << 4)) - 32


@triton.jit
def q4_k_codes(base, live, table):
    """Runs of 32 bytes: low nibbles, then high nibbles."""
    return fields(read(base, live, _Q4_K_QS, 32), 32, 4, 4)


@triton.jit
def q5_k_codes(base, live, table):
    """As Q4_K; plane j of qh is the fifth bit of weights 32 j .. 32 j + 31."""
    high = fields(read(base, live, _Q5_K_QH, 8), 32, 4, 1)
    return fields(read(base, live, _Q5_K_QS, 32), 32, 4, 4) | (high << 4)


@triton.jit
def six_bit_scales(base, live):
    """Q4_K, Q5_K: d, dmin and twelve bytes a, b, c of four: s = a & 63, then c & 15 | a >> 6 << 4; minima of b, c >> 4."""
    word = tl.load(base, mask=live, other=0)
    group = tl.arange(0, 8)
    shift = (group % 4 * 8).to(tl.uint32)[None, :]
    a = tl.load(base + _Q4_K_SCALES, mask=live, other=0)[:, None] >> shift
    b = tl.load(base + _Q4_K_SCALES + 1, mask=live, other=0)[:, None] >> shift
    c = tl.load(base + _Q4_K_SCALES + 2, mask=live, other=0)[:, None] >> shift
    first = (group < 4)[None, :]
    scale = tl.where(first, a & 63, (c & 15) | ((a >> 2) & 48))
    minimum = tl.where(first, b & 63, ((c >> 4) & 15) | ((b >> 2) & 48))
    return half(word), scale.to(tl.int32), half(word >> 16), minimum.to(tl.int32)


@triton.jit
def q6_k_codes(base, live, table):
    """Runs of 64 bytes of nibbles and of 32 bytes of 2-bit planes, each run 128 weights."""
    high = fields(read(base, live, _Q6_K_QH, 32), 32, 2, 2)
    return fields(read(base, live, _Q6_K_QL, 64), 64, 2, 4) | (high << 4)


@triton.jit
def q6_k_scales(base, live):
    """A signed byte for 16 weights."""
    d = half(tl.load(base + _Q6_K_D, mask=live, other=0))
    return d, signed(sequence(read(base, live, _Q6_K_SCALES, 8), 16, 8), 8)


@triton.jit
def iq4_xs_codes(base, live, table):
    """Runs of 16 bytes of nibbles; they index the sixteen levels of IQ4_NL."""
    return fields(read(base, live, _IQ4_XS_QS, 32), 16, 4, 4)


@triton.jit
def iq4_xs_scales(base, live):
    """Six bits less 32: nibbles of scales_l under 2-bit fields of scales_h, which shares a word with d."""
    word = tl.load(base, mask=live, other=0)
    group = tl.arange(0, 8).to(tl.uint32)[None, :]
    low = tl.load(base + _IQ4_XS_SCALES_L, mask=live, other=0)[:, None] >> (4 * group)
    high = (word >> 16)[:, None] >> (2 * group)
    return half(word), ((low & 15) | ((high & 3) << 4)).to(tl.int32) - 32
