"""Helpers of the decoders: offsets of fields, and unpacking of bit fields into codes.

Words are as wide as the alignment of a format's blocks: 2 bytes for Q6_K (210 bytes per block) and 4 bytes for
Q4_K (144).
"""

import triton
import triton.language as tl

from zimage_core.formats import FORMATS


def word_bytes(name: str) -> int:
    """Bytes per word when blocks of a format are read: the largest of 4, 2, 1 that divides a block."""
    return next(width for width in (4, 2, 1) if FORMATS[name].nbytes % width == 0)


def at(name: str, field: str, shift: int = 0) -> tl.constexpr:
    """Offset of a field in words, `shift` bytes after its start; a constant that kernels may read."""
    offset, width = FORMATS[name].offset(field) + shift, word_bytes(name)
    if offset % width:
        raise ValueError(f"{name}.{field} starts inside a word of {width} bytes")
    return tl.constexpr(offset // width)


@triton.jit
def half(word):
    """The float16 in the low 16 bits of each word, as float32."""
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def read(base, live, START: tl.constexpr, COUNT: tl.constexpr):
    """COUNT words from word START of each block: pointers [SB] -> uint32 [SB, COUNT]."""
    words = tl.load(base[:, None] + START + tl.arange(0, COUNT)[None, :], mask=live[:, None], other=0)
    return words.to(tl.uint32)


@triton.jit
def fields(words, RUN: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    """ggml's order of bit fields: a run of RUN bytes gives the lowest field of each byte, then the next ...

    words: uint32 [SB, n], BYTES bytes in each. Result: int32 [SB, n * BYTES * 8 / WIDTH].
    """
    SB: tl.constexpr = words.shape[0]
    COUNT: tl.constexpr = words.shape[1]
    PER_RUN: tl.constexpr = RUN // BYTES
    RUNS: tl.constexpr = COUNT // PER_RUN
    PER_BYTE: tl.constexpr = 8 // WIDTH
    tile = tl.reshape(words, (SB, RUNS, 1, PER_RUN, 1))
    field = (tl.arange(0, PER_BYTE) * WIDTH)[None, None, :, None, None]
    byte = (tl.arange(0, BYTES) * 8)[None, None, None, None, :]
    tile = (tile >> (field + byte).to(tl.uint32)) & ((1 << WIDTH) - 1)
    return tl.reshape(tile.to(tl.int32), (SB, COUNT * BYTES * PER_BYTE))


@triton.jit
def sequence(words, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Fields of one word after the other, lowest first: uint32 [SB, n] of BITS bits -> int32 [SB, n * BITS / WIDTH]."""
    SB: tl.constexpr = words.shape[0]
    COUNT: tl.constexpr = words.shape[1]
    PER_WORD: tl.constexpr = BITS // WIDTH
    shift = (tl.arange(0, PER_WORD) * WIDTH).to(tl.uint32)[None, None, :]
    tile = (tl.reshape(words, (SB, COUNT, 1)) >> shift) & ((1 << WIDTH) - 1)
    return tl.reshape(tile.to(tl.int32), (SB, COUNT * PER_WORD))


@triton.jit
def signed(code, BITS: tl.constexpr):
    """Two's complement of BITS bits in int32 -> its value."""
    return (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
