"""Rows of several tensors as one, for layers that may take int8 rows. No parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from zimage_core.quant.int8 import Int8Rows


def joined(parts: Iterable[Tensor | Int8Rows], rows: int) -> Tensor:
    """The rows of several [L, D], one part behind the other; of int8 rows with their scales.

    Each part is copied before the next one is made, so that one of an iterator is held at a time.

    Args:
        parts: At least one; all of them int8 rows, or none.
        rows: Number of their rows.

    Returns:
        [rows, D], or an `Int8Rows`, which a layer takes as it takes floats.
    """
    out, start = None, 0
    for part in parts:
        if out is None:
            out = _empty(part, rows)
        own = slice(start, start + part.shape[0])
        if isinstance(part, Tensor):
            out[own] = part  # type: ignore[index]
        elif isinstance(out, Int8Rows):
            out.values[own], out.scale[own] = part.values, part.scale
        start = own.stop
        del part
    return out  # type: ignore[return-value]


def _empty(like: Tensor | Int8Rows, rows: int) -> Tensor | Int8Rows:
    if isinstance(like, Int8Rows):
        both = like.values.new_empty(rows, like.shape[-1]), like.scale.new_empty(rows)
        return Int8Rows(*both, (rows,), like.dtype, like.rotation)
    return like.new_empty(rows, *like.shape[1:])
