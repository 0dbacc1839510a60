"""Rotates blocks of K numbers by a regular Hadamard matrix, which spreads outliers before they are quantised.

`reference.int8` specifies it. A block of 256 is rotated by two products with 16 x 16 matrices, because
H256 is the Kronecker product of H16 with itself: 32 multiplications a number instead of 256. Smaller blocks
take one product with the whole matrix; for 64 numbers that is five times as fast as two.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

GROUP = 256
"""Usual block of the rotation."""
_INNER = 16
"""Size of the factor that multiplies adjacent numbers, for blocks of more than `_WHOLE`."""
_WHOLE = 64
"""Largest block that is multiplied by the whole matrix."""


def rotation_group(width: int) -> int:
    """Block of the rotation for rows of `width` numbers: the largest power of four, up to GROUP, in it."""
    group = GROUP
    while width % group:
        group //= 4
    return group


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The regular Hadamard matrix float32 [size, size]: symmetric and orthogonal.

    Args:
        size: A power of four.
        device: Where it is kept.
    """
    with torch.inference_mode(False):  # the matrix is used after the caller's mode ends
        rows = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
        h4 = torch.tensor(rows, dtype=torch.float32) / 2
        found = torch.ones(1, 1, dtype=torch.float32)
        while len(found) < size:
            found = torch.kron(found, h4)
        return found.to(device)


def rotate(x: Tensor, group: int) -> Tensor:
    """x R, with R block-diagonal in blocks of `group`; R is its own inverse.

    Args:
        x: float32 [..., K], on any device.
        group: A power of four that divides K; 0 and 1 return x.

    Returns:
        [..., K], float32.
    """
    if group <= 1:
        return x
    x = x.contiguous()
    return rotate_into(torch.empty_like(x), x, group, torch.empty_like(x))


def rotate_into(out: Tensor, x: Tensor, group: int, scratch: Tensor) -> Tensor:
    """`rotate` into existing memory.

    Args:
        out: float32 [..., K], contiguous; returned.
        x: float32 [..., K], contiguous, not the memory of out.
        group: A power of four that divides K, at least 4.
        scratch: float32 of the same shape, contiguous.
    """
    inner = group if group <= _WHOLE else _INNER
    first = out if group == inner else scratch
    torch.mm(x.view(-1, inner), hadamard(inner, x.device), out=first.view(-1, inner))
    if group > inner:
        outer = group // inner
        blocks = x.numel() // group
        left = hadamard(outer, x.device).expand(blocks, outer, outer)
        torch.bmm(left, scratch.view(blocks, outer, inner), out=out.view(blocks, outer, inner))
    return out
