"""Rotary position embedding: the angles of both networks, and the text encoder's rotation.

Su et al. 2021, arXiv 2104.09864, equation 34. The transformer rotates adjacent channels, together with
the norm in front (`elementwise.qk_norm_rope`); the text encoder rotates channel j with channel j + D / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each pair's angle, float32 [L, D / 2]."""


def rotation(positions: Tensor, dims: Sequence[int], theta: float) -> Rotation:
    """Angles of several axes side by side.

    Frequencies are theta^(-2k / d), k = 0 .. d / 2 - 1, for an axis of d channels; angles are
    products in float64, rounded to float32 before the cosine, as in diffusers.

    Shape:
        positions [L, len(dims)] integer -> cosine and sine [L, sum(dims) / 2] float32.
    """
    angles = [
        torch.outer(
            positions[:, axis].double(),
            theta ** -(torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / d),
        )
        for axis, d in enumerate(dims)
    ]
    angle = torch.cat(angles, dim=-1).float()
    return angle.cos(), angle.sin()


def rotate_half(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate channels (j, j + D / 2) by angle j; float32 inside, dtype of x outside.

    Shape:
        x [..., L, H, D], angles [L, D / 2] -> [..., L, H, D].
    """
    cos, sin = (t.unsqueeze(-2) for t in angles)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
