"""The norms of an S3-DiT block together with what follows them: one fused step, or the norm as a module.

The fused steps of `nn/elementwise` only read a norm's weight. A norm that has hooks, or was replaced by
another module, is called as a module instead, and the step after it is plain torch. That rounds once more, as
diffusers does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zimage_core.nn.elementwise import gate_norm_residual, qk_norm_rope, rms_norm_modulate
from zimage_core.nn.layers import RMSNorm, Rotation, has_hooks

NAMES = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "norm_q", "norm_k")
"""Names of these norms in a block."""


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is this library's, without hooks, so that only its numbers count."""
    return type(norm) is RMSNorm and not has_hooks(norm)


def norm_modulate(norm: RMSNorm, x: Tensor, scale: Tensor | None) -> Tensor:
    """norm(x) * (1 + scale), for scale None norm(x); see `rms_norm_modulate`."""
    if is_plain(norm):
        return rms_norm_modulate(x, norm.weight, norm.eps, scale)
    normed: Tensor = norm(x)
    return normed if scale is None else normed * (1 + scale.to(x.dtype))


def norm_residual(
    norm: RMSNorm, x: Tensor, branch: Tensor, gate: Tensor | None, factor: float = 1.0
) -> Tensor:
    """x + gate * norm(branch / factor); see `gate_norm_residual`."""
    if is_plain(norm):
        return gate_norm_residual(x, branch, norm.weight, norm.eps, gate, factor)
    # in float16 the branch is scaled down, and its true size needs float32
    normed: Tensor = norm(branch if factor == 1.0 else branch.float() / factor)
    return (x + (normed if gate is None else gate.to(x.dtype) * normed)).to(x.dtype)


def norms_rope(
    norm_q: RMSNorm, norm_k: RMSNorm, q: Tensor, k: Tensor, eps: float, rope: Rotation
) -> tuple[Tensor, Tensor]:
    """Norm of each head of q and k, then the rotation; see `qk_norm_rope`."""
    if is_plain(norm_q) and is_plain(norm_k):
        return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, eps, *rope)
    angles = torch.complex(rope[0].float(), rope[1].float()).unsqueeze(-2)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)

    return rotated(norm_q(q)), rotated(norm_k(k))
