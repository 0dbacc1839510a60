"""The element-wise steps of an S3-DiT block in plain torch: float32 inside, rounded once at the end.

They run where kernels do not and where a gradient is wanted; order of operations as in
`zimage_core.kernels.elementwise`. Vectors over the last axis are multiplied with each other first:
that is one pass less over the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm_modulate_torch(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight * (1 + scale).

    Shape:
        x [..., D], weight [D], scale [D], broadcast to x, or None -> [..., D], dtype of x.
    """
    gain = weight.float() if scale is None else weight.float() * (1 + scale.float())
    return (_unit(x, eps) * gain).to(x.dtype)


def gate_norm_residual_torch(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """x + tanh(gate) * weight * branch / rms(branch), with eps * factor^2 under the root.

    Shape:
        x, branch [..., D], weight [D], gate [D], broadcast to x, or None -> [..., D], dtype of x.
    """
    gain = weight.float() if gate is None else weight.float() * gate.float().tanh()
    return torch.addcmul(x.float(), _unit(branch, eps * factor * factor), gain).to(x.dtype)


def qk_norm_rope_torch(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight of each head, then channels (2j, 2j + 1) turned by angle j; of q and of k.

    Shape:
        q, k [..., L, H, D], weights [D], cos and sin [L, D / 2] -> [..., L, H, D] twice, each its dtype.
    """
    turn = torch.complex(cos.float(), sin.float()).unsqueeze(-2)

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        # the same products as written out, one pass for six
        normed = _unit(x, eps) * weight.float()
        pairs = torch.view_as_complex(normed.reshape(*x.shape[:-1], x.shape[-1] // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    return turned(q, q_weight), turned(k, k_weight)


def silu_gate_torch(gate: Tensor, up: Tensor, factor: float = 1.0) -> Tensor:
    """silu(gate) * up * factor.

    Shape:
        gate, up [...] -> [...], dtype of gate.
    """
    product = functional.silu(gate.float()) * up.float()
    return (product if factor == 1.0 else product * factor).to(gate.dtype)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
