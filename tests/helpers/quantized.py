"""Test weights for quantisers, and measures of their error."""

from __future__ import annotations

from os import PathLike

import numpy as np
from numpy.typing import NDArray

from zimage_core.reference.dequantize import dequantize
from zimage_core.weights.opened import open_weights

Array = NDArray[np.float32]
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SMALL = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "Q2_0_128")
SAME_BYTES = (*LEGACY, "TQ1_0", "TQ2_0", "MXFP4")
"""Without importance these are the bytes of gguf-py and ggml, so no search is made."""
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


def real_weights(path: str | PathLike[str], rows: int = 64) -> Array:
    """Rows of SmolLM2 side by side, [rows, 8 * 512]: four runs of token embeddings, four matrices of layers.

    Its file holds the embeddings in Q8_0 and the matrices in Q4_1, whose blocks are cut in the middle here,
    so that a type of 4 bits does not meet the levels of one block under one scale.
    """
    names = [f"blk.{layer}.{part}.weight" for layer in (2, 21) for part in ("attn_output", "ffn_gate")]
    with open_weights(path) as file:
        embeddings = file.tensor("token_embd.weight")
        found = [embeddings.rows(start, start + rows).dequantize() for start in (500, 5000, 15000, 40000)]
        found += [file.tensor(name).rows(0, rows).dequantize() for name in names]
        return np.concatenate([part[:, 16:528].numpy() for part in found], axis=1)
