"""Float64 in place of float32 on both sides, and how far two results may be apart.

In float64 a difference of two programs is a difference of their formulas; in float32 it is mostly rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOAT32 = torch.float32
"""The real one; `in_float64` gives its name to another."""

WIDE = 1e-10
"""Largest difference allowed in float64.

For values of 2 to 12, one sum in another order is off by eps = 2e-16 of that, and the most sensitive case
(guidance 4 at shift 6, eight steps) multiplies it by 200. The worst found is 3.7e-13 with AVX2 (AMD EPYC) and
3.0e-13 held to SSE4. A single float32 rounding left on one side would be up to 6e-8 of the value before it is
multiplied. 1e-10 lies between, a factor of 200 and more from either, so that neither another order of sums
fails nor another formula passes.
"""

NARROW = 16
"""In float32 the two may differ by this many times what float32 moves the peer itself.

That is the distance of the peer's float32 result from its float64 result on the same CPU: no constant, so a
CPU that sums in another order moves the limit along. If our rounding were as theirs, the two would differ by
at most twice the distance; both are the largest of as few as 32 numbers, which is luck of another factor of 2
or 3. Found: 2.7 at most, of the VAE at 8 x 8 pixels; 1.1 of the transformer. A single rounding to half
precision is 8192 times one to float32, so 16 leaves no room for one.
"""

_LIFTED: tuple[tuple[Any, str, Any], ...] = (
    (torch, "float32", torch.float64),
    (torch, "float", torch.float64),
    (torch, "complex64", torch.complex128),
    (np, "float32", np.float64),
    (Tensor, "float", Tensor.double),
)
_PLAIN = tuple((owner, name, getattr(owner, name)) for owner, name, _ in _LIFTED)


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, whatever asks for float32 by name gets float64, in this library and in the others.

    Casts of rotary angles, times, norms, latents, noise levels and guidance are lifted on both sides alike,
    so that no rounding hides a difference of formulas. Networks must be made inside: buffers are computed at
    construction. What was drawn or written in float32 keeps its values. It changes torch and NumPy for the
    whole process, so no other thread may compute meanwhile.
    """
    with _named(_LIFTED, torch.float64):
        yield


@contextmanager
def in_float32() -> Iterator[None]:
    """Inside, and inside of `in_float64`, the names mean again what they say."""
    with _named(_PLAIN, FLOAT32):
        yield


@contextmanager
def _named(table: tuple[tuple[Any, str, Any], ...], default: torch.dtype) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in table]
    dtype = torch.get_default_dtype()
    try:
        for owner, name, value in table:
            setattr(owner, name, value)
        torch.set_default_dtype(default)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for owner, name, value in before:
            setattr(owner, name, value)
