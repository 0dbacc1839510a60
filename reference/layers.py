"""The layers of the three networks in float64: the specification of the torch modules.

Inputs of any dtype are widened first, so that results differ from the exact ones only by float64 rounding,
and a test can bound the error of a float32 module by that module's rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Doubles = NDArray[np.float64]

F64 = np.float64


def linear(x: Array, weight: Array, bias: Array | None = None) -> Doubles:
    """y = x W^T + b; x [..., K], weight [N, K], bias [N] -> [..., N]."""
    y: Doubles = x.astype(F64) @ weight.astype(F64).T
    return y if bias is None else y + bias.astype(F64)


def rms_norm(x: Array, weight: Array, eps: float) -> Doubles:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; weight [size].

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """
    wide = x.astype(F64)
    y: Doubles = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + eps) * weight.astype(F64)
    return y


def layer_norm(x: Array, eps: float) -> Doubles:
    """y = (x - mean) / sqrt(var + eps) over the last axis, without weights (the final layer's norm)."""
    wide = x.astype(F64)
    y: Doubles = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps)
    return y


def group_norm(x: Array, groups: int, weight: Array, bias: Array, eps: float) -> Doubles:
    """Normalise each group of channels over channels and space; x [B, C, ...], weight and bias [C]."""
    grouped = x.astype(F64).reshape(x.shape[0], groups, -1)
    y = ((grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + eps)).reshape(
        x.shape
    )
    per_channel = (1, -1, *(1,) * (x.ndim - 2))
    z: Doubles = y * weight.astype(F64).reshape(per_channel) + bias.astype(F64).reshape(per_channel)
    return z


def silu(x: Array) -> Doubles:
    """y = x / (1 + exp(-x)), also called swish."""
    wide = x.astype(F64)
    y: Doubles = wide * np.exp(-np.logaddexp(0, -wide))  # no overflow at either end
    return y


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Doubles:
    """y = (silu(x G^T) * x U^T) D^T: w1, w3, w2 of the transformer, gate, up, down of the encoder."""
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def softmax(x: Array) -> Doubles:
    """softmax over the last axis; a row of only -inf gives NaN."""
    wide = x.astype(F64)
    weights = np.exp(wide - wide.max(axis=-1, keepdims=True))
    y: Doubles = weights / weights.sum(axis=-1, keepdims=True)
    return y


def rope_angles(positions: Array, dim: int, theta: float) -> Doubles:
    """angle[l, i] = positions[l] * theta^(-2i / dim); positions [L] -> [L, dim / 2].

    Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2.
    """
    frequencies = F64(theta) ** (-np.arange(0, dim, 2, dtype=F64) / dim)
    angles: Doubles = positions.astype(F64)[:, None] * frequencies
    return angles


def rope_angles_axes(positions: Array, dims: Sequence[int], theta: float) -> Doubles:
    """The angles of several axes side by side; positions [L, axes], dims (32, 48, 48) -> [L, sum / 2]."""
    columns = [rope_angles(positions[:, axis], dim, theta) for axis, dim in enumerate(dims)]
    return np.concatenate(columns, axis=-1)


def rope_interleaved(x: Array, angles: Doubles) -> Doubles:
    """Rotate the pairs (x[2i], x[2i + 1]): the transformer's convention.

    x [..., L, heads, dim], angles [L, dim / 2] -> as x.
    """
    wide = x.astype(F64)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    even, odd = wide[..., 0::2], wide[..., 1::2]
    rotated = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    y: Doubles = rotated.reshape(x.shape)
    return y


def rope_half_split(x: Array, angles: Doubles) -> Doubles:
    """Rotate the pairs (x[i], x[dim / 2 + i]): the text encoder's convention.

    x [..., L, heads, dim], angles [L, dim / 2] -> as x.
    """
    wide = x.astype(F64)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = np.split(wide, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


def attention(q: Array, k: Array, v: Array, mask: Array | None = None, scale: float | None = None) -> Doubles:
    """softmax(q k^T * scale) v per head; query head h reads key head h * key heads // query heads.

    Args:
        q: [..., L, heads, dim].
        k: [..., S, key heads, dim]; key heads divide heads.
        v: [..., S, key heads, dim].
        mask: bool [L, S] or [..., L, S], True where a query may look; None means everywhere.
        scale: 1 / sqrt(dim) when None.

    Returns:
        [..., L, heads, dim].
    """
    repeat = q.shape[-2] // k.shape[-2]
    queries = np.moveaxis(q.astype(F64), -2, -3)
    keys = np.moveaxis(np.repeat(k.astype(F64), repeat, axis=-2), -2, -3)
    values = np.moveaxis(np.repeat(v.astype(F64), repeat, axis=-2), -2, -3)
    scores = queries @ np.swapaxes(keys, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = np.where(mask[..., None, :, :], scores, -np.inf)
    return np.moveaxis(softmax(scores) @ values, -3, -2)


def causal_mask(length: int) -> NDArray[np.bool_]:
    """bool [length, length]: position i looks at 0..i."""
    return np.tri(length, dtype=np.bool_)


def timestep_embedding(t: Array, dim: int, max_period: float = 10000.0) -> Doubles:
    """[cos(t f), sin(t f)] with f[i] = max_period^(-i / (dim / 2)); t [B] -> [B, dim], dim even."""
    half = dim // 2
    frequencies = F64(max_period) ** (-np.arange(half, dtype=F64) / half)
    angles = t.astype(F64)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
