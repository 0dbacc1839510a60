"""How a time becomes a vector: a sinusoid and a small network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zimage_core.nn.linear import Linear

FREQUENCIES = 256
"""Length of the sinusoid that encodes the timestep."""
MAX_PERIOD = 10000.0
"""Longest period of that sinusoid, in units of t * t_scale."""


def timestep_sinusoid(t: Tensor) -> Tensor:
    """Scaled time [B] -> [B, 256] float32: cosines first, then sines, of t * 10000^(-i / 128)."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid, then Linear, SiLU, Linear."""

    def __init__(self, out: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(FREQUENCIES, hidden, bias=True), nn.SiLU(), Linear(hidden, out, bias=True)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Scaled time [B] float32 -> [B, out] in `dtype`."""
        out: Tensor = self.mlp(timestep_sinusoid(t).to(dtype))
        return out
