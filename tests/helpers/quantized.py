"""Weights that a quantiser is judged on, and how it is judged."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zimage_core.reference.dequantize import dequantize

Array = NDArray[np.float32]
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SMALL = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "Q2_0_128")
BLOCK_TYPES = (*LEGACY, *K_TYPES, *SMALL)
"""Every block format of the encoders that search scales; the IQ types have tests of their own."""

MAKERS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "student": lambda rng, shape: rng.standard_t(3, shape) * 0.02,
}


def weights(kind: str, shape: tuple[int, int], seed: int = 0) -> Array:
    """A fixed matrix: "gaussian" of deviation 0.02 or "student" with three degrees of freedom."""
    return MAKERS[kind](np.random.default_rng(seed), shape).astype(np.float32)


def importance(k: int, seed: int = 5) -> Array:
    """Log-normal costs of k input channels, as far apart as activations of a trained network make them."""
    return np.exp(np.random.default_rng(seed).standard_normal(k)).astype(np.float32)


def weighted_error(packed: NDArray[np.uint8], name: str, x: Array, costs: Array | None) -> float:
    """Square root of sum(costs * (x - decoded)^2) / sum(costs * x^2), in float64."""
    exact = x.astype(np.float64)
    difference = dequantize(packed, name).astype(np.float64) - exact
    w = 1.0 if costs is None else costs.astype(np.float64)
    return float(np.sqrt((w * difference**2).sum() / (w * exact**2).sum()))
