"""Root-mean-square norm, with its rounding order written down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zimage_core.errors import BadShape


class RMSNorm(nn.Module):
    """Scale a vector to unit root mean square, then by a learned weight.

    Mean, reciprocal root and the product with it are taken in float32 whatever the input dtype; the
    result is rounded to the input dtype before the product with the weight, as transformers does.
    The blocks of S3-DiT read weight and eps only: `zimage_core.nn.elementwise` rounds once.

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
        if x.shape[-1] != self.weight.shape[0]:
            raise BadShape(f"RMSNorm: got rows of {x.shape[-1]}, the weight has {self.weight.shape[0]}")
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * inverse).to(x.dtype) * self.weight.to(x.dtype)
