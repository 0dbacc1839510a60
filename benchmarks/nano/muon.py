"""Muon: momentum whose matrix updates are made orthogonal; for the matrices inside the blocks.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Matrices of one shape are handled as one
batch, which keeps the cost on a CPU at a fraction of a training step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(g: Tensor, steps: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """g [N, R, C] -> nearly orthogonal matrices with the same singular vectors, computed in `dtype`."""
    x = g.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().square().sum((-2, -1), keepdim=True).sqrt() + 1e-7).to(dtype)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; step length lr * sqrt(max(1, rows / columns))."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for (rows, cols), params in shapes.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                made = orthogonalise(torch.stack(updates), dtype=self.dtype).float()
                for p, u in zip(params, made, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-scale)
