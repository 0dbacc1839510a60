"""Attention whose q k^T is a product of int8 rows, with smoothed keys: what `compute="int8"` may take.

    softmax(q k'^T / sqrt(D)) v,  k' = k - mean of k over the tokens

Taking the mean away adds the same number to all scores of a query, which softmax does not see. But the keys
of a head share large channels; what is left of them is smaller, so that a scale for each token rounds less.
Source: SageAttention, arXiv 2410.02367, section 4.2.

The sums of int8 are exact, everything after them is float64 here. Implementations compute softmax in float32
and round its weights, not their sum, to the dtype in which they multiply by v.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage_core.reference.int8 import quantize_rows

Array = NDArray[Any]


def smoothed(k: Array) -> Array:
    """k [..., L, D] less its mean over the tokens."""
    found: Array = k - k.mean(-2, keepdims=True)
    return found


def attention(q: Array, k: Array, v: Array, smooth: bool = True) -> Array:
    """q, k, v [..., L, D] -> [..., L, D], with q and k as int8 rows.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        smooth: Whether the mean of the keys is taken away before.
    """
    qi, q_scale = quantize_rows(q)
    ki, k_scale = quantize_rows(smoothed(k) if smooth else k)
    sums = qi.astype(np.float64) @ np.swapaxes(ki, -1, -2).astype(np.float64)
    scores = sums * q_scale[..., :, None] * k_scale[..., None, :] * q.shape[-1] ** -0.5
    return softmax(scores) @ v


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    found: Array = raised / raised.sum(-1, keepdims=True)
    return found
