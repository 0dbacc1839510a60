"""Packed bytes as named NumPy fields, derived from the descriptors in formats.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage_core.errors import BadArgument, BadShape
from zimage_core.formats import BlockFormat

Bytes = NDArray[np.uint8]
Ints = NDArray[Any]  # unsigned integers unpacked from the fields, uint8 where not stated
Blocks = NDArray[Any]  # structured, one element a block: blocks["qs"] is [..., count]
Floats = NDArray[np.float32]


@cache
def block_dtype(fmt: BlockFormat) -> np.dtype[Any]:
    """The structured dtype of one block, so that `blocks["qs"]` is the field, not an offset.

    Every field has an axis of its own, also one that holds a single number: "d" is [..., 1].
    """
    return np.dtype([(field.name, f"<{field.code}", (field.count,)) for field in fmt.fields])


def as_blocks(packed: Bytes, fmt: BlockFormat) -> Blocks:
    """View uint8 [..., row bytes] as blocks [..., row bytes / block bytes], copying only if not contiguous.

    Raises:
        BadArgument: packed is not a uint8 array.
        BadShape: It has no axis, or its rows are not whole blocks.
    """
    if getattr(packed, "dtype", None) != np.uint8:
        found = getattr(packed, "dtype", type(packed).__name__)
        raise BadArgument(f"packed {fmt.name} data must be a NumPy array of uint8, found {found}")
    if packed.ndim == 0 or packed.shape[-1] % fmt.nbytes:
        raise BadShape(
            f"packed {fmt.name} data of shape {packed.shape} is not whole blocks of {fmt.nbytes} bytes "
            "along its last axis; pass complete rows"
        )
    return np.ascontiguousarray(packed).view(block_dtype(fmt))
