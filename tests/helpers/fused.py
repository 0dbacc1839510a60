"""The fused element-wise steps: inputs, float64 oracles, and the distance float32 and one rounding may have.

Bounds count roundings of U = 2^-24, relative to the sum of magnitudes that is formed, element by element:

- mean square: runs of at most 32 and a tree above them, the square and the division; halved by the root.
- rsqrt and division, approximate on a GPU: 4 each. exp: 4 and its argument's own rounding, |argument|.
- every product and sum: 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from zimage_core.reference import layers

EPS = 1e-5
U = 2.0**-24
TINY = 2.0**-126
"""What a flushed subnormal of float32 may miss."""

ROUNDING = {
    torch.float32: (0.0, 0.0),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
}
"""Half a unit in the last place, relative, and half the smallest subnormal."""

Bounded = tuple[np.ndarray, np.ndarray]
"""Oracle and absolute error that float32 arithmetic may add before the result is rounded."""


def double(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def norm_roundings(size: int) -> float:
    return (32 + math.log2(size) + 6) / 2 + 4 + 2


def rms_norm_modulate(x, weight, eps, scale=None) -> list[Bounded]:
    want = layers.rms_norm(double(x), double(weight), eps)
    if scale is not None:
        want = want * (1 + double(scale))
    return [(want, (norm_roundings(x.shape[-1]) + 2) * U * abs(want) + TINY)]


def gate_norm_residual(x, branch, weight, eps, gate=None, factor=1.0) -> list[Bounded]:
    added = layers.rms_norm(double(branch), double(weight), eps * factor**2)
    if gate is not None:
        added = added * double(gate)
    want = double(x) + added
    slack = (norm_roundings(x.shape[-1]) + 1) * U * abs(added) + U * abs(want)
    return [(want, slack + TINY)]


def qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin) -> list[Bounded]:
    angles = np.arctan2(double(sin), double(cos))
    both = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = layers.rms_norm(double(x), double(weight), eps)
        a, b = abs(normed[..., 0::2]), abs(normed[..., 1::2])
        c, s = abs(np.cos(angles))[:, None], abs(np.sin(angles))[:, None]
        sizes = np.stack([a * c + b * s, a * s + b * c], axis=-1).reshape(normed.shape)
        # cosine and sine were rounded to float32: a little more than 1 each, through the angle
        slack = (norm_roundings(x.shape[-1]) + 6) * U * sizes + 2 * U * (a + b).repeat(2, axis=-1)
        both.append((layers.rope_interleaved(normed, angles), slack + TINY))
    return both


def silu_gate(gate, up, factor=1.0) -> list[Bounded]:
    g, u = double(gate), double(up) * factor
    want = layers.silu(g) * u
    slack = (abs(g) + 14) * U * abs(want) + (1 + abs(g)) * (1 + abs(u)) * TINY
    return [(want, slack)]


@dataclass(frozen=True)
class Step:
    """One operation: its oracle, and arguments for it from sizes and a source of numbers."""

    name: str
    expected: Callable[..., list[Bounded]]
    arguments: Callable[[Draw], tuple[Any, ...]]

    def __str__(self) -> str:
        return self.name


@dataclass
class Draw:
    """Random tensors: rows of different magnitude, zeros among them; dense, or views with gaps."""

    seed: int
    dtype: torch.dtype
    rows: int
    size: int
    heads: int = 3
    magnitudes: tuple[float, ...] = (1.0,)
    strided: bool = False
    optional: bool = True
    factor: float = 1.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        if self.dtype == torch.float16:
            self.magnitudes = tuple(min(m, 1e4) for m in self.magnitudes)  # normal numbers reach six of these

    def tensor(self, values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        dense = torch.from_numpy(np.ascontiguousarray(values)).to(dtype or self.dtype)
        if (
            self.strided and dense.ndim > 1
        ):  # gaps between rows, another for each, as in slices of a projection
            left, right = (int(n) for n in self.rng.integers(0, 4, 2))
            width = dense.shape[-1]
            host = torch.full((*dense.shape[:-1], left + width + right), float("nan"), dtype=dense.dtype)
            host[..., left : left + width] = dense
            return host.to(self.device)[..., left : left + width]
        return dense.to(self.device)

    def activations(self, *shape: int) -> Tensor:
        scale = self.rng.choice(self.magnitudes, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
        return self.tensor(self.rng.standard_normal(shape).clip(-6, 6) * scale)

    def vector(self, mean: float = 0.0) -> Tensor:
        return self.tensor(self.rng.standard_normal(self.size) + mean)

    def maybe(self) -> Tensor | None:
        """A vector of a modulation: float32, as the transformer makes it, or of the dtype of x."""
        if not self.optional:
            return None
        return self.tensor(self.rng.standard_normal(self.size), torch.float32 if self.seed % 2 else None)


def _rms_norm_modulate(d: Draw):
    return d.activations(d.rows, d.size), d.vector(1.0), EPS, d.maybe()


def _gate_norm_residual(d: Draw):
    x, branch = d.activations(d.rows, d.size), d.activations(d.rows, d.size)
    return x, branch, d.vector(1.0), EPS, d.maybe(), d.factor


def _qk_norm_rope(d: Draw):
    size = d.size + d.size % 2
    d.size = size
    angles = d.rng.uniform(-np.pi, np.pi, (d.rows, size // 2))
    turn = (d.tensor(np.cos(angles), torch.float32), d.tensor(np.sin(angles), torch.float32))
    q, k = (d.activations(d.rows, d.heads, size) for _ in range(2))
    return q, k, d.vector(1.0), d.vector(1.0), EPS, *turn


def _silu_gate(d: Draw):
    gate, up = d.activations(d.rows, d.size), d.activations(d.rows, d.size)
    if d.dtype == torch.float16:  # the product must fit as well
        gate = gate.clamp(-200, 200) if not d.strided else gate.clamp_(-200, 200)
        up = up.clamp(-200, 200) if not d.strided else up.clamp_(-200, 200)
    return gate, up, d.factor


STEPS = [
    Step("rms_norm_modulate", rms_norm_modulate, _rms_norm_modulate),
    Step("gate_norm_residual", gate_norm_residual, _gate_norm_residual),
    Step("qk_norm_rope", qk_norm_rope, _qk_norm_rope),
    Step("silu_gate", silu_gate, _silu_gate),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draws(dtype: torch.dtype, rows: int = 5) -> st.SearchStrategy[Draw]:
    """Small shapes, magnitudes from 0 to 1e6, dense and with gaps."""
    return st.builds(
        Draw,
        seed=st.integers(0, 2**32 - 1),
        dtype=st.just(dtype),
        rows=st.integers(1, rows),
        size=st.sampled_from((1, 2, 3, 5, 8, 31, 64, 100)) | st.integers(1, 140),
        heads=st.integers(1, 5),
        magnitudes=st.lists(st.sampled_from((0.0, 1e-6, 1e-3, 1.0, 30.0, 1e6)), min_size=1, max_size=3).map(
            tuple
        ),
        strided=st.booleans(),
        optional=st.booleans(),
        factor=st.sampled_from((1.0, 2.0**-7, 0.5)),
    )


def tuple_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_is_the_oracle(
    got: Tensor | tuple[Tensor, ...], want: list[Bounded], truncates: bool = False
) -> None:
    """Every element within its bound; `truncates`: bfloat16 is cut, as in Triton's interpreter."""
    results = tuple_of(got)
    assert len(results) == len(want)
    for which, (result, (exact, slack)) in enumerate(zip(results, want, strict=True)):
        assert tuple(result.shape) == exact.shape
        relative, least = ROUNDING[result.dtype]
        if truncates and result.dtype == torch.bfloat16:
            relative, least = 2 * relative, 2 * least
        bound = slack + relative * (abs(exact) + slack) + least
        error = abs(double(result) - exact)
        wrong = ~((error <= bound) | (np.isnan(exact) & np.isnan(double(result))))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"result {which}, element {at} of {exact.shape} {result.dtype}: got {double(result)[at]!r}, "
                f"want {exact[at]!r}, off by {error[at]:.3g} where {bound[at]:.3g} is allowed"
            )
