"""Products of int8 rows: the specification of `compute="int8"`.

    y[m, n] = (sum_k xq[m, k] wq[n, k]) * w_scale[n] * x_scale[m] + bias[n]

Weights have one scale for each row, activations one for each token. Both are symmetric, without a zero point.
The sum is exact in int32, so every implementation is held to it bit for bit; scaling and bias are float32.

Rotating both operands by the same orthogonal matrix R changes no product, (x R)(W R)^T = x W^T, and spreads
an outlier over a block of R, which makes the largest number of a row smaller. Source of the rotation: ConvRot
(regular Hadamard matrices), as in ComfyUI's int8 files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Array = NDArray[Any]

LARGEST = np.float32(127)
"""Largest magnitude of a quantised number; -128 is not used, so that the range is symmetric."""
LEAST = np.float32(2.0**-100)
"""Least absmax that a scale is computed from; it keeps 127 / absmax finite for rows of zeros."""
GROUP = 256
"""Usual block of the rotation."""

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2


def rotation_group(width: int) -> int:
    """Block of the rotation for rows of `width` numbers: the largest power of four, up to 256, in it."""
    group = GROUP
    while width % group:
        group //= 4
    return group


def hadamard(size: int) -> Floats:
    """The regular Hadamard matrix [size, size], a Kronecker power of H4: symmetric and orthogonal.

    Args:
        size: A power of four.
    """
    found: Floats = np.ones((1, 1), np.float32)
    while len(found) < size:
        found = np.kron(found, H4)
    return found


def rotate(x: Array, group: int) -> Floats:
    """x R for x [..., K] with R block-diagonal in blocks of `group`; group 0 returns x in float32."""
    wide = x.astype(np.float32)
    if not group:
        return wide
    blocks: Floats = wide.reshape(-1, group) @ hadamard(group)
    return blocks.reshape(x.shape)


def quantize_rows(x: Array, group: int = 0) -> tuple[NDArray[np.int8], Floats]:
    """Rows of numbers as int8 and scales, rounded to nearest even in float32.

    Args:
        x: [..., K], weights or activations.
        group: Block of the rotation before; 0 for none.

    Returns:
        int8 [..., K], float32 [...]; a row with NaN or infinity has a scale that is not finite.
    """
    wide = rotate(x, group)
    largest = np.maximum(np.abs(wide).max(-1, initial=0), LEAST)
    with np.errstate(invalid="ignore"):
        quantised = np.rint(wide * (LARGEST / largest)[..., None]).astype(np.int8)
    return quantised, largest / LARGEST


def product(
    xq: NDArray[np.int8], x_scale: Floats, wq: NDArray[np.int8], w_scale: Floats, bias: Array | None = None
) -> Floats:
    """y [M, N] of xq [M, K], x_scale [M], wq [N, K], w_scale [N] and bias [N]."""
    # float64 holds sums up to 2^53 exactly, and its product is quicker than that of integers
    exact = (xq.astype(np.float64) @ wq.astype(np.float64).T).astype(np.int32)
    y: Floats = exact.astype(np.float32) * w_scale * x_scale[:, None]
    return y if bias is None else y + bias.astype(np.float32)
