"""The table of decoders: how a kernel decodes the blocks of each format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from zimage_core.codebooks import codebook
from zimage_core.formats import FORMATS
from zimage_core.kernels.decode import i_quants, k_quants, legacy
from zimage_core.kernels.decode.bits import word_bytes


@dataclass(frozen=True)
class Decoder:
    """How blocks become weights: w = scale * level - minimum.

    Args:
        codes: jit function (base [SB] pointers to words, live [SB], table) -> int32 [SB, weights].
        scales: jit function (base, live) -> d [SB], then a small scale [SB, groups] if `sub`, and the same
            pair again for the minimum if `affine`; scale = d * small, every product exact in float32.
        groups: Scales in a block.
        sub: Whether a group has a small scale of its own under the block's d.
        affine: Whether there is a minimum.
        zero: Code of level 0: level = code - zero.
        lookup: Whether level = table[code], with a table of sixteen levels.
        bits: Width of a code in the planar layout of the fused kernel; 0 if there is none.
        exponent: Whether d is a power of two, which needs bfloat16 instead of float16.
        float_small: Whether the small scales are float16 numbers instead of integers.
    """

    codes: Any
    scales: Any
    groups: int = 1
    sub: bool = False
    affine: bool = False
    zero: int = 0
    lookup: bool = False
    bits: int = 0
    exponent: bool = False
    float_small: bool = False

    def constants(self, name: str) -> dict[str, Any]:
        """The constexpr arguments of a kernel that decodes blocks of the format `name`."""
        fmt = FORMATS[name]
        return {
            "CODES": self.codes,
            "SCALES": self.scales,
            "WORDS": fmt.nbytes // word_bytes(name),
            "WEIGHTS": fmt.weights,
            "GROUPS": self.groups,
            "SUB": self.sub,
            "AFFINE": self.affine,
            "ZERO": self.zero,
            "LOOKUP": self.lookup,
        }


# fmt: off
DECODERS: dict[str, Decoder] = {
    "Q4_0": Decoder(legacy.q4_0_codes, legacy.scale, zero=8, bits=4),
    "Q4_1": Decoder(legacy.q4_1_codes, legacy.scale_and_offset, affine=True, bits=4),
    "Q5_0": Decoder(legacy.q5_0_codes, legacy.scale, zero=16, bits=5),
    "Q5_1": Decoder(legacy.q5_1_codes, legacy.scale_and_offset, affine=True, bits=5),
    "Q8_0": Decoder(legacy.q8_0_codes, legacy.scale, bits=8),
    "Q2_K": Decoder(k_quants.q2_k_codes, k_quants.q2_k_scales, 16, sub=True, affine=True, bits=2),
    "Q3_K": Decoder(k_quants.q3_k_codes, k_quants.q3_k_scales, 16, sub=True, zero=4, bits=3),
    "Q4_K": Decoder(k_quants.q4_k_codes, k_quants.six_bit_scales, 8, sub=True, affine=True, bits=4),
    "Q5_K": Decoder(k_quants.q5_k_codes, k_quants.six_bit_scales, 8, sub=True, affine=True, bits=5),
    "Q6_K": Decoder(k_quants.q6_k_codes, k_quants.q6_k_scales, 16, sub=True, zero=32, bits=6),
    "IQ4_NL": Decoder(legacy.q4_0_codes, legacy.scale, lookup=True, bits=4),
    "IQ4_XS": Decoder(k_quants.iq4_xs_codes, k_quants.iq4_xs_scales, 8, sub=True, lookup=True, bits=4),
    "IQ2_XXS": Decoder(i_quants.iq2_xxs_codes, i_quants.iq2_xxs_scales, 8, sub=True),
    "IQ2_XS": Decoder(i_quants.iq2_xs_codes, i_quants.iq2_xs_scales, 16, sub=True),
    "IQ2_S": Decoder(i_quants.iq2_s_codes, i_quants.iq2_s_scales, 16, sub=True),
    "IQ3_XXS": Decoder(i_quants.iq3_xxs_codes, i_quants.iq3_xxs_scales, 8, sub=True),
    "IQ3_S": Decoder(i_quants.iq3_s_codes, i_quants.iq3_s_scales, 8, sub=True),
    "IQ1_S": Decoder(i_quants.iq1_s_codes, i_quants.iq1_s_scales, 8, sub=True),
    "IQ1_M": Decoder(i_quants.iq1_m_codes, i_quants.iq1_m_scales, 16, sub=True),
    "TQ1_0": Decoder(legacy.tq1_0_codes, legacy.tq1_0_scales, zero=1),
    "TQ2_0": Decoder(legacy.tq2_0_codes, legacy.tq2_0_scales, zero=1, bits=2),
    "MXFP4": Decoder(legacy.mxfp4_codes, legacy.mxfp4_scale, lookup=True, bits=4, exponent=True),
    "NVFP4": Decoder(legacy.nvfp4_codes, legacy.nvfp4_scales, 4, sub=True, lookup=True, bits=4, float_small=True),
    "Q1_0": Decoder(legacy.q1_0_codes, legacy.scale),
    "Q2_0": Decoder(legacy.q2_0_codes, legacy.scale, zero=1, bits=2),
    "Q2_0_128": Decoder(legacy.q2_0_128_codes, legacy.scale, zero=1, bits=2),
}
# fmt: on

_word_bytes = cache(word_bytes)
_WORDS = {4: torch.uint32, 2: torch.uint16, 1: torch.uint8}


def words(packed: torch.Tensor, name: str) -> torch.Tensor:
    """Packed bytes as the words that the decoders read; a copy if they are not aligned. Words remain as they are."""
    width = _word_bytes(name)
    if packed.dtype == _WORDS[width] and packed.ndim == 1 and packed.is_contiguous():
        return packed
    if not packed.is_contiguous() or packed.data_ptr() % width or packed.storage_offset() % width:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(-1).view(_WORDS[width])


@cache
def lookup_table(name: str, device: torch.device) -> torch.Tensor | None:
    """The codebook of a format on the device: float32 [16] of levels, or int32 words of four grid values."""
    book = FORMATS[name].codebook
    if book is None:
        return None
    found = codebook(book)
    with torch.inference_mode(False):  # the table is used after the caller's mode ends
        values = torch.frombuffer(bytearray(found.values), dtype=torch.int8)
        return (values.float() if found.width == 1 else values.view(torch.int32)).to(device)


def levels(name: str) -> tuple[int, int]:
    """The sixteen int8 levels of a format, as the bytes of two signed 64-bit numbers."""
    book = FORMATS[name].codebook
    values = codebook(book or "").values
    return int.from_bytes(values[:8], "little", signed=True), int.from_bytes(
        values[8:], "little", signed=True
    )
