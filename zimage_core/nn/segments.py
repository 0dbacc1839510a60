"""Rows of several tensors as one, for layers that may take int8 rows. No parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zimage_core.quant.int8 import Int8Rows


def joined(parts: Sequence[Tensor | Int8Rows]) -> Tensor:
    """The rows of several [L, D], one part behind the other; of int8 rows with their scales.

    Returns:
        [sum of L, D], or an `Int8Rows` where every part is one, which a layer takes as it takes floats.
    """
    rows = [part for part in parts if isinstance(part, Int8Rows)]
    if len(rows) < len(parts):
        return torch.cat([part.dequantize() if isinstance(part, Int8Rows) else part for part in parts])
    values, scale = torch.cat([part.values for part in rows]), torch.cat([part.scale for part in rows])
    return Int8Rows(values, scale, (len(values),), rows[0].dtype, rows[0].rotation)  # type: ignore[return-value]
