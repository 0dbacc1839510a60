"""The least error that the scales of a block allow, by trying everything: rows, halves, patterns of signs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage_core.codebooks import codebook
from zimage_core.formats import by_name
from zimage_core.reference.bits import consecutive, words
from zimage_core.reference.blocks import as_blocks

Doubles = NDArray[np.float64]
UNITS = {
    "IQ1_S": 1,
    "IQ1_M": 1,
    "IQ2_XXS": 1 / 8,
    "IQ2_XS": 1 / 8,
    "IQ2_S": 1 / 8,
    "IQ3_XXS": 1 / 4,
    "IQ3_S": 1,
}
"""A sub-block's step is d * unit * (1 + 2 * level); docs/explanation/formats.md with 2 taken out."""
LEVELS = {name: 8 if name.startswith("IQ1") else 16 for name in UNITS}
EVEN = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")
"""Formats that store seven signs of eight."""


def stored_scales(packed: NDArray[np.uint8], name: str) -> tuple[Doubles, NDArray[np.int64]]:
    """d * unit [blocks] and levels [blocks, sub-blocks] of packed rows."""
    blocks: Any = as_blocks(packed, by_name(name)).reshape(-1)
    if name == "IQ1_M":
        quarters = (blocks["scales"] >> 12) << np.array([0, 4, 8, 12], np.uint16)
        d = np.bitwise_or.reduce(quarters, axis=-1).view(np.float16)
        level = words(blocks["scales"], (0, 3, 6, 9), 7)
    else:
        d = blocks["d"].reshape(-1)
        level = {
            "IQ1_S": lambda: words(blocks["qh"], (12,), 7),
            "IQ2_XXS": lambda: blocks["qs"][:, 1::2] >> 28,
            "IQ3_XXS": lambda: blocks["gas"] >> 28,
        }.get(name, lambda: consecutive(blocks["scales"], 4))()
    return d.astype(np.float64) * UNITS[name], level.astype(np.int64)


def parts_of(name: str, values: Doubles) -> Doubles:
    """Sums over what is chosen together: 32 weights that share a half in IQ1_S, else 8."""
    return values.reshape(-1, 32 if name == "IQ1_S" else 8).sum(1)


def least_errors(name: str, x: Doubles, w: Doubles, steps: Doubles) -> tuple[Doubles, Doubles]:
    """The least sum(w * (x - decoded)^2) of each part, and the size of its largest terms.

    Args:
        name: A format with a codebook of rows.
        x: Weights [K].
        w: Importance [K].
        steps: The step of each sub-block.
    """
    book = codebook(by_name(name).codebook)
    rows = np.frombuffer(book.values, np.int8).reshape(book.shape).astype(np.float64)
    eights, costs = x.reshape(-1, 8), w.reshape(-1, 8)
    s = np.repeat(steps, len(eights) // len(steps))[:, None]
    terms = (costs * eights**2).sum(1) + s[:, 0] ** 2 * costs.sum(1) * (rows**2).max()
    if name.startswith("IQ1"):
        halves = np.stack([_by_rows(eights - delta * s, costs, s, rows) for delta in (0.125, -0.125)])
        if name == "IQ1_S":
            halves, terms = halves.reshape(2, -1, 4).sum(-1), terms.reshape(-1, 4).sum(1)
        return halves.min(0), terms
    if name not in EVEN:
        return _by_rows(np.abs(eights), costs, s, rows), terms
    patterns = 1.0 - 2.0 * (np.arange(256)[:, None] >> np.arange(8) & 1)
    even = patterns[patterns.prod(1) > 0]
    return np.min([_by_rows(eights * pattern, costs, s, rows) for pattern in even], axis=0), terms


def _by_rows(a: Doubles, w: Doubles, s: Doubles, rows: Doubles) -> Doubles:
    """The least error of each 8 weights [m, 8], of one row or of the two rows that stand for them: [m]."""
    width = rows.shape[1]
    step = np.repeat(s, 8 // width, axis=0)
    a, w = a.reshape(-1, width), w.reshape(-1, width)
    errors = (w * a**2).sum(1, keepdims=True) - 2 * step * (w * a) @ rows.T + step**2 * (w @ (rows**2).T)
    least: Doubles = errors.min(1).reshape(-1, 8 // width).sum(1)
    return least
