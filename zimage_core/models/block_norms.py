"""Norms and gate of an S3-DiT block together with what follows: one fused step, or the norm as a module.

The fused steps of `nn/elementwise` only read a norm's weight. A norm that has hooks, or was replaced by
another module, is called as a module instead, and the step after it is plain torch. That rounds once more, as
diffusers does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zimage_core.nn.elementwise import (
    gate_norm_residual,
    qk_norm_rope,
    rms_norm_modulate,
    rms_norm_modulate_int8,
    silu_gate,
    silu_gate_int8,
)
from zimage_core.nn.layers import RMSNorm, Rotation, has_hooks
from zimage_core.nn.linear import shared_rotation

NAMES = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "norm_q", "norm_k")
"""Names of these norms in a block."""


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is this library's, without hooks, so that only its numbers count."""
    return type(norm) is RMSNorm and not has_hooks(norm)


def norm_modulate(norm: RMSNorm, x: Tensor, scale: Tensor | None, branch: nn.Module) -> Tensor:
    """norm(x) * (1 + scale), for scale None norm(x); see `rms_norm_modulate`.

    Args:
        norm: The norm.
        x: [..., D].
        scale: D numbers, or None.
        branch: The module that takes the result, in the form that its `readers` share (`nn.linear.ready`).
    """
    if is_plain(norm):
        rotation = shared_rotation(*_readers(branch))
        if rotation is not None:
            return rms_norm_modulate_int8(x, norm.weight, norm.eps, scale, rotation)  # type: ignore[return-value]
        return rms_norm_modulate(x, norm.weight, norm.eps, scale)
    normed: Tensor = norm(x)
    return normed if scale is None else normed * (1 + scale.to(x.dtype))


def _readers(branch: nn.Module) -> tuple[nn.Module, ...]:
    """Layers that read the input of a branch; none where other code sees it as well."""
    own = "readers" in vars(type(branch)) and "forward" not in vars(branch)  # no subclass, no other forward
    return branch.readers if own and not has_hooks(branch) else ()  # type: ignore[return-value]


def gated(gate: Tensor, up: Tensor, reader: nn.Module) -> Tensor:
    """silu(gate) * up in the form that the layer `reader` takes; see `silu_gate`."""
    rotation = shared_rotation(reader)
    if rotation is None:
        return silu_gate(gate, up)
    return silu_gate_int8(gate, up, 1.0, rotation)  # type: ignore[return-value]


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
