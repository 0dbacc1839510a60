"""Packed bytes to float32 with plain NumPy: the specification that every fast path must match.

It is written to be read, not to be fast. Only tests, tools and `parity` import it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zimage_core.formats import BlockFormat, by_name
from zimage_core.reference import i_quants, k_quants, legacy, numbers
from zimage_core.reference.blocks import Blocks, Bytes, Floats, as_blocks

DEQUANTIZERS: dict[str, Callable[[Blocks], Floats]] = {
    "F32": numbers.number,
    "F16": numbers.number,
    "Q4_0": legacy.q4_0,
    "Q4_1": legacy.q4_1,
    "Q5_0": legacy.q5_0,
    "Q5_1": legacy.q5_1,
    "Q8_0": legacy.q8_0,
    "Q2_K": k_quants.q2_k,
    "Q3_K": k_quants.q3_k,
    "Q4_K": k_quants.q4_k,
    "Q5_K": k_quants.q5_k,
    "Q6_K": k_quants.q6_k,
    "IQ2_XXS": i_quants.iq2_xxs,
    "IQ2_XS": i_quants.iq2_xs,
    "IQ3_XXS": i_quants.iq3_xxs,
    "IQ1_S": i_quants.iq1_s,
    "IQ4_NL": i_quants.iq4_nl,
    "IQ3_S": i_quants.iq3_s,
    "IQ2_S": i_quants.iq2_s,
    "IQ4_XS": i_quants.iq4_xs,
    "I8": numbers.number,
    "I16": numbers.number,
    "I32": numbers.number,
    "I64": numbers.number,
    "F64": numbers.number,
    "IQ1_M": i_quants.iq1_m,
    "BF16": numbers.bf16,
    "TQ1_0": legacy.tq1_0,
    "TQ2_0": legacy.tq2_0,
    "MXFP4": legacy.mxfp4,
    "NVFP4": legacy.nvfp4,
    "Q1_0": legacy.q1_0,
    "Q2_0": legacy.q2_0,
    "Q2_0_128": legacy.q2_0,
    "F8_E4M3": numbers.f8_e4m3,
    "F8_E5M2": numbers.f8_e5m2,
}


def dequantize(packed: Bytes, fmt: BlockFormat | str) -> Floats:
    """Decode packed rows; NaN and infinite scales are no error and give the same results as in ggml.

    Args:
        packed: uint8 [..., row bytes].
        fmt: A format or its name ("Q4_K").

    Returns:
        float32 [..., K] with K = row bytes / block bytes * block weights.

    Raises:
        UnknownFormat: No format of that name.
        BadArgument: packed is not a uint8 array.
        BadShape: Its rows are not whole blocks.
    """
    if not isinstance(fmt, BlockFormat):
        fmt = by_name(fmt)
    blocks = as_blocks(packed, fmt)
    with np.errstate(all="ignore"):  # overflow and NaN are in the bytes, not in the arithmetic
        weights = DEQUANTIZERS[fmt.name](blocks)
    return weights.reshape(*packed.shape[:-1], blocks.shape[-1] * fmt.weights)
