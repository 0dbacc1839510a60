"""IQ1_S to IQ3_S: rows of 4 or 8 weights from a codebook, with a float16 scale and small odd integers.

`table` holds int32 words of four int8 each: one word per row of 4, two words per row of 8. No product of a scale
and a value has more than 22 bits, so computing the reference's 1/2 + s as (2 s + 1) / 2 changes no weight.
Each format is a pair of functions; README.md of `kernels/` has the contract.
"""

import triton
import triton.language as tl

from zimage_core.kernels.decode.bits import at, half, read, sequence

_IQ2_XXS_QS = at("IQ2_XXS", "qs")
_IQ2_XS_QS = at("IQ2_XS", "qs")
_IQ2_XS_SCALES = at("IQ2_XS", "scales")
_IQ2_S_QS = at("IQ2_S", "qs")
_IQ2_S_SIGNS = at("IQ2_S", "signs")
_IQ2_S_QH = at("IQ2_S", "qh")
_IQ2_S_SCALES = at("IQ2_S", "scales")
_IQ3_XXS_QS = at("IQ3_XXS", "qs")
_IQ3_XXS_GAS = at("IQ3_XXS", "gas")
_IQ3_S_QS = at("IQ3_S", "qs")
_IQ3_S_QH = at("IQ3_S", "qh")
_IQ3_S_SIGNS = at("IQ3_S", "signs")
_IQ3_S_SCALES = at("IQ3_S", "scales")
_IQ1_S_QS = at("IQ1_S", "qs")
_IQ1_S_QH = at("IQ1_S", "qh")
_IQ1_M_QS = at("IQ1_M", "qs")
_IQ1_M_QH = at("IQ1_M", "qh")
_IQ1_M_SCALES = at("IQ1_M", "scales")


@triton.jit
def _rows_of_eight(table, index):
    """The two words of each row: [SB, n] -> int32 [SB, 2 n]."""
    SB: tl.constexpr = index.shape[0]
    COUNT: tl.constexpr = index.shape[1]
    quads = tl.load(table + (index.to(tl.int32) * 2)[:, :, None] + tl.arange(0, 2)[None, None, :])
    return tl.reshape(quads, (SB, 2 * COUNT))


@triton.jit
def _signed_values(quads, signs):
    """Four int8 of each word, negated where their bit is set: int32 [SB, n] and int32 [SB, n] of four bits -> [SB, 4 n].

    No value of these grids is 0, so that ~x + 1 carries into no other byte of the word.
    """
    SB: tl.constexpr = quads.shape[0]
    COUNT: tl.constexpr = quads.shape[1]
    ones = (signs * 0x204081) & 0x01010101  # bit i to bit 8 i
    quads = (quads ^ (ones * 255)) + ones
    top = tl.reshape(quads, (SB, COUNT, 1)) << (24 - 8 * tl.arange(0, 4))[None, None, :]
    return tl.reshape(top >> 24, (SB, 4 * COUNT))


@triton.jit
def _eight_signs(seven):
    """Seven bits and their parity as two nibbles: uint32 [SB, n] -> int32 [SB, 2 n]; bit x of 0x6996 is x's parity."""
    parity = ((0x6996 << 7) >> ((seven ^ (seven >> 4)) & 15)) & 128
    return sequence(seven | parity, 8, 4)


@triton.jit
def _seven_bits(low, live):
    """The four 7-bit fields of words of 4 bytes that begin at 2-byte pointers: [SB, 8] -> uint32 [SB, 32]."""
    SB: tl.constexpr = low.shape[0]
    word = tl.load(low, mask=live[:, None], other=0).to(tl.uint32)
    word |= tl.load(low + 1, mask=live[:, None], other=0).to(tl.uint32) << 16
    fields = (tl.reshape(word, (SB, 8, 1)) >> (tl.arange(0, 4) * 7).to(tl.uint32)[None, None, :]) & 127
    return tl.reshape(fields, (SB, 32))


@triton.jit
def iq2_xxs_codes(base, live, table):
    """For 32 weights four index bytes, then a word of four times seven signs under the scale."""
    SB: tl.constexpr = base.shape[0]
    start = base[:, None] + _IQ2_XXS_QS + 4 * tl.arange(0, 8)[None, :]
    index = tl.load(start[:, :, None] + tl.arange(0, 2)[None, None, :], mask=live[:, None, None], other=0)
    index = sequence(tl.reshape(index.to(tl.uint32), (SB, 16)), 16, 8)
    return _signed_values(_rows_of_eight(table, index), _eight_signs(_seven_bits(start + 2, live)))


@triton.jit
def iq2_xxs_scales(base, live):
    """d / 8 * (2 s + 1), s in the top bits of the second word of 32 weights."""
    start = base[:, None] + _IQ2_XXS_QS + 4 * tl.arange(0, 8)[None, :]
    s = tl.load(start + 3, mask=live[:, None], other=0).to(tl.int32) >> 12
    return half(tl.load(base, mask=live, other=0)) * 0.125, 2 * s + 1


@triton.jit
def iq2_xs_codes(base, live, table):
    """Nine bits of index under seven of signs."""
    words = read(base, live, _IQ2_XS_QS, 32)
    return _signed_values(_rows_of_eight(table, words & 511), _eight_signs(words >> 9))


@triton.jit
def iq2_xs_scales(base, live):
    """d / 8 * (2 s + 1), s a nibble for 16 weights."""
    s = sequence(read(base, live, _IQ2_XS_SCALES, 4), 16, 4)
    return half(tl.load(base, mask=live, other=0)) * 0.125, 2 * s + 1


@triton.jit
def iq2_s_codes(base, live, table):
    """The index is a byte of qs under two bits of qh; a bit of signs for each weight."""
    index = sequence(read(base, live, _IQ2_S_QS, 16), 16, 8)
    index |= sequence(read(base, live, _IQ2_S_QH, 4), 16, 2) << 8
    return _signed_values(_rows_of_eight(table, index), sequence(read(base, live, _IQ2_S_SIGNS, 16), 16, 4))


@triton.jit
def iq2_s_scales(base, live):
    """d / 8 * (2 s + 1), s a nibble for 16 weights."""
    s = sequence(read(base, live, _IQ2_S_SCALES, 4), 16, 4)
    return half(tl.load(base, mask=live, other=0)) * 0.125, 2 * s + 1


@triton.jit
def iq3_xxs_codes(base, live, table):
    """Index bytes of rows of 4; a word of four times seven signs under the scale for 32 weights."""
    quads = tl.load(table + sequence(read(base, live, _IQ3_XXS_QS, 32), 16, 8))
    seven = _seven_bits(base[:, None] + _IQ3_XXS_GAS + 2 * tl.arange(0, 8)[None, :], live)
    return _signed_values(quads, _eight_signs(seven))


@triton.jit
def iq3_xxs_scales(base, live):
    """d / 4 * (2 s + 1), s in the top bits of the word of 32 weights."""
    high = base[:, None] + _IQ3_XXS_GAS + 1 + 2 * tl.arange(0, 8)[None, :]
    s = tl.load(high, mask=live[:, None], other=0).to(tl.int32) >> 12
    return half(tl.load(base, mask=live, other=0)) * 0.25, 2 * s + 1


@triton.jit
def iq3_s_codes(base, live, table):
    """The index of a row of 4 is a byte of qs under a bit of qh; a bit of signs for each weight."""
    index = sequence(read(base, live, _IQ3_S_QS, 32), 16, 8)
    index |= sequence(read(base, live, _IQ3_S_QH, 4), 16, 1) << 8
    return _signed_values(tl.load(table + index), sequence(read(base, live, _IQ3_S_SIGNS, 16), 16, 4))


@triton.jit
def iq3_s_scales(base, live):
    """d * (2 s + 1), s a nibble for 32 weights."""
    s = sequence(read(base, live, _IQ3_S_SCALES, 2), 16, 4)
    return half(tl.load(base, mask=live, other=0)), 2 * s + 1


@triton.jit
def _eighths(quads, minus):
    """8 g + 1, or 8 g - 1 where minus is 1: words of four g, int32 [SB, n], and int32 [SB, m] -> int32 [SB, 4 n]."""
    SB: tl.constexpr = quads.shape[0]
    COUNT: tl.constexpr = quads.shape[1]
    RUNS: tl.constexpr = minus.shape[1]
    top = tl.reshape(quads, (SB, COUNT, 1)) << (24 - 8 * tl.arange(0, 4))[None, None, :]
    eighths = tl.reshape((top >> 24) * 8, (SB, RUNS, 4 * COUNT // RUNS)) + (1 - 2 * minus)[:, :, None]
    return tl.reshape(eighths, (SB, 4 * COUNT))


@triton.jit
def iq1_s_codes(base, live, table):
    """Bytes of qs under four times three bits of a word, whose top bit is the sign of the 1/8 of 32 weights."""
    SB: tl.constexpr = base.shape[0]
    words = read(base, live, _IQ1_S_QH, 8)
    high = (tl.reshape(words, (SB, 8, 1)) >> (tl.arange(0, 4) * 3).to(tl.uint32)[None, None, :]) & 7
    index = sequence(read(base, live, _IQ1_S_QS, 16), 16, 8) | (tl.reshape(high, (SB, 32)) << 8).to(tl.int32)
    return _eighths(_rows_of_eight(table, index), (words >> 15).to(tl.int32))


@triton.jit
def iq1_s_scales(base, live):
    """d / 8 * (2 s + 1), s three bits for 32 weights."""
    s = (read(base, live, _IQ1_S_QH, 8) >> 12).to(tl.int32) & 7
    return half(tl.load(base, mask=live, other=0)) * 0.125, 2 * s + 1


@triton.jit
def iq1_m_codes(base, live, table):
    """A byte of qs under three bits of a nibble of qh, whose top bit is the sign of the 1/8 of 8 weights."""
    nibble = sequence(read(base, live, _IQ1_M_QH, 4), 32, 4)
    index = sequence(read(base, live, _IQ1_M_QS, 8), 32, 8) | ((nibble & 7) << 8)
    return _eighths(_rows_of_eight(table, index), nibble >> 3)


@triton.jit
def iq1_m_scales(base, live):
    """d / 8 * (2 s + 1), s three bits for 16 weights, four of them under a nibble of d in each half of a word."""
    SB: tl.constexpr = base.shape[0]
    first = tl.load(base + _IQ1_M_SCALES, mask=live, other=0)
    second = tl.load(base + _IQ1_M_SCALES + 1, mask=live, other=0)
    low = ((first >> 12) & 15) | ((first >> 24) & 0xF0)
    d = half(low | ((second >> 4) & 0xF00) | ((second >> 16) & 0xF000))
    words = tl.reshape(read(base, live, _IQ1_M_SCALES, 2), (SB, 2, 1, 1))
    half_word = (tl.arange(0, 2) * 16).to(tl.uint32)[None, None, :, None]
    s = (words >> half_word >> (tl.arange(0, 4) * 3).to(tl.uint32)[None, None, None, :]) & 7
    return d * 0.125, 2 * tl.reshape(s, (SB, 16)).to(tl.int32) + 1
