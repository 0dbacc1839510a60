"""Layers without packed weights: the RMS norm and rotary positions.

Each docstring gives the order of rounding. Rotary positions are those of Su et al. 2021, arXiv 2104.09864,
equation 34. The transformer rotates adjacent channels, together with the norm before it
(`elementwise.qk_norm_rope`); the text encoder rotates channel j with channel j + D / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zimage_core.errors import BadShape

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each pair's angle, float32 [L, D / 2]."""


class RMSNorm(nn.Module):
    """Scale a vector to unit root mean square, then by a learned weight.

    Mean, reciprocal root and the product with it are computed in float32 for every input dtype; the result is
    rounded to the input dtype before the product with the weight, as in transformers. The blocks of S3-DiT
    only read weight and eps, unless a norm has hooks: `zimage_core.nn.elementwise` does their arithmetic and
    rounds once.

    Args:
        size: Length of the last axis.
        eps: Added to the mean square, in the square of the input's unit.

    Shape:
        x [..., size] -> [..., size], dtype of x.

    Raises:
        BadShape: The last axis of x is not `size`.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        weight: Tensor = self.weight
        if x.shape[-1] != weight.shape[0]:
            raise BadShape(f"RMSNorm: got rows of {x.shape[-1]}, the weight has {weight.shape[0]}")
        if x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu":
            # the same operations in one call, a quarter less time for one token
            return nn.functional.rms_norm(x, weight.shape, weight, self.eps)
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * inverse).to(x.dtype) * weight.to(x.dtype)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on the module itself."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def rotation(positions: Tensor, dims: Sequence[int], theta: float) -> Rotation:
    """Cosine and sine of rotary angles, with the angles of several axes side by side.

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


def for_halves(angles: Rotation) -> Rotation:
    """What `rotate_half` takes, made once for all layers: the cosine twice, the sine negated and plain.

    Shape:
        [L, D / 2] each -> [L, D] each.
    """
    cos, sin = angles
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate_half(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate channels (j, j + D / 2) by angle j; computed in float32, returned in x's dtype.

    Shape:
        x [..., L, H, D], angles `for_halves` [L, D] -> [..., L, H, D].
    """
    cos, sin = (t.unsqueeze(-2) for t in angles)
    wide = x.float()
    turned = wide.roll(wide.shape[-1] // 2, -1)
    return turned.mul_(sin).add_(wide * cos).to(x.dtype)
