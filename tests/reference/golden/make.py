"""Makes blocks.json: blocks of the types that the gguf package does not decode, and what they mean.

An independent computation: one weight at a time in plain Python, following the scalar loops of
dequantize_row_* in ggml/src/ggml-quants.c (llama.cpp pull requests 21273 for Q1_0 and 24448 for
Q2_0), exact rational arithmetic for the fp8 types, and `struct` for the rest. Nothing is shared with
the code under test: no NumPy, no descriptors. `python tests/reference/golden/make.py` rewrites the
file, which is committed so that a change of either side shows.
"""

from __future__ import annotations

import json
import math
import random
import struct
from fractions import Fraction
from pathlib import Path


def float32(value: float | Fraction) -> bytes:
    """Four bytes, rounded to nearest even, infinite beyond the range."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


def one_bit(block: bytes) -> list[float]:
    """Q1_0: float16 d, then one bit a weight; 1 means d, 0 means -d."""
    d = struct.unpack_from("<e", block)[0]
    return [d if block[2 + j // 8] >> j % 8 & 1 else -d for j in range(8 * (len(block) - 2))]


def two_bits(block: bytes) -> list[float]:
    """Q2_0: float16 d, then two bits a weight; 0, 1, 2, 3 mean -d, 0, d, 2d."""
    d = struct.unpack_from("<e", block)[0]
    return [((block[2 + j // 4] >> 2 * (j % 4) & 3) - 1) * d for j in range(4 * (len(block) - 2))]


def f8_e4m3(block: bytes) -> list[float]:
    """OFP8 E4M3: no infinity, NaN only where all seven lower bits are set."""
    sign, exponent, mantissa = (-1) ** (block[0] >> 7), block[0] >> 3 & 15, block[0] & 7
    if exponent == 15 and mantissa == 7:
        return [math.nan]
    if exponent == 0:
        magnitude = Fraction(mantissa, 8) / 2**6
    else:
        magnitude = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    return [math.copysign(float(magnitude), sign)]


def f8_e5m2(block: bytes) -> list[float]:
    """OFP8 E5M2: IEEE-like, the largest exponent holds infinity and NaN."""
    sign, exponent, mantissa = (-1) ** (block[0] >> 7), block[0] >> 2 & 31, block[0] & 3
    if exponent == 31:
        return [math.nan if mantissa else math.copysign(math.inf, sign)]
    if exponent == 0:
        magnitude = Fraction(mantissa, 4) / 2**14
    else:
        magnitude = (1 + Fraction(mantissa, 4)) * Fraction(2) ** (exponent - 15)
    return [math.copysign(float(magnitude), sign)]


def unpack(code: str, block: bytes) -> list[float]:
    """One number as struct reads it; integers stay integers until they are rounded once, to float32."""
    value = struct.unpack(code, block)[0]
    if isinstance(value, int):  # via Fraction: float(value) would round twice
        return [nearest_float32(Fraction(value))]
    return [value]


def nearest_float32(value: Fraction) -> float:
    """The float32 nearest to an exact number, ties to an even last bit."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value))) - 23
    while abs(value) / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while abs(value) / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    return float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)  # round: ties to even


def golden() -> dict[str, dict[str, str]]:
    """{format: packed bytes and weights, as hexadecimal}."""
    rng = random.Random(20)
    d = [struct.pack("<e", value) for value in (0.0371, -1.5, 6e-8, 65504.0)]
    blocks = {
        "Q1_0": [scale + rng.randbytes(16) for scale in d],
        "Q2_0": [scale + rng.randbytes(16) for scale in d],
        "Q2_0_128": [scale + rng.randbytes(32) for scale in d],
        "F64": [
            struct.pack("<d", value)
            for value in (0.1, -0.0, 1 + 2**-24, 1 + 3 * 2**-24, 1e-45, 1e-46, 3.5e38, -math.inf, math.pi)
        ],
        "I8": [struct.pack("<b", value) for value in (-128, -1, 0, 127)],
        "I16": [struct.pack("<h", value) for value in (-32768, -1, 0, 32767)],
        "I32": [struct.pack("<i", value) for value in (-(2**31), -1, 0, 2**24 + 1, 2**24 + 3, 2**31 - 1)],
        "I64": [
            struct.pack("<q", value) for value in (-(2**63), -1, 0, 2**24 + 1, 2**54 + 2**30 + 1, 2**63 - 1)
        ],
        "F8_E4M3": [bytes([code]) for code in range(256)],
        "F8_E5M2": [bytes([code]) for code in range(256)],
    }
    decoders = {
        "Q1_0": one_bit,
        "Q2_0": two_bits,
        "Q2_0_128": two_bits,
        "F64": lambda block: unpack("<d", block),
        "I8": lambda block: unpack("<b", block),
        "I16": lambda block: unpack("<h", block),
        "I32": lambda block: unpack("<i", block),
        "I64": lambda block: unpack("<q", block),
        "F8_E4M3": f8_e4m3,
        "F8_E5M2": f8_e5m2,
    }
    return {
        name: {
            "packed": b"".join(rows).hex(),
            "weights": b"".join(float32(w) for row in rows for w in decoders[name](row)).hex(),
        }
        for name, rows in blocks.items()
    }


if __name__ == "__main__":
    text = json.dumps(golden(), indent=1) + "\n"
    Path(__file__).with_name("blocks.json").write_text(text, encoding="utf-8")
