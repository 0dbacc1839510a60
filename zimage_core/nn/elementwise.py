"""The element-wise steps of an S3-DiT block: shapes are checked and the code that runs is chosen here.

Triton kernels where `paths.kernels_for` says so and no gradient is asked for, their twins in plain
torch elsewhere; both compute in float32 and round once. Under torch.compile a kernel is one opaque
operator of the namespace `zimage`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.errors import BadShape
from zimage_core.nn.elementwise_torch import (
    gate_norm_residual_torch,
    qk_norm_rope_torch,
    rms_norm_modulate_torch,
    silu_gate_torch,
)
from zimage_core.quant.dispatch import kernels_for


def rms_norm_modulate(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight * (1 + scale) over the last axis.

    Args:
        x: [..., D], any strides.
        weight: [D].
        eps: Added to the mean square, in the square of the unit of x.
        scale: D numbers with any leading axes of length 1, or None for 0. One vector for each member
            of a batch, broadcast to x, runs in plain torch.

    Returns:
        [..., D], dtype of x.

    Raises:
        BadShape: weight or scale does not fit x.
    """
    _check_vector("rms_norm_modulate", "weight", x, weight)
    if scale is not None:
        scale = _vector("rms_norm_modulate", "scale", x, scale)
    if not _fused(x, weight, scale) or _per_member(scale):
        return rms_norm_modulate_torch(x, weight, eps, scale)
    run = _rms_norm_modulate_op if torch.compiler.is_compiling() else _rms_norm_modulate
    return run(x, weight, eps, scale)


def gate_norm_residual(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """x + tanh(gate) * weight * branch / rms(branch): a gated branch joins the residual stream.

    Args:
        x: [..., D], any strides.
        branch: [..., D], the branch output times `factor`.
        weight: [D].
        eps: Added to the mean square of the branch without factor.
        gate: D numbers with any leading axes of length 1, or None for an open gate (1, not tanh of
            something). One vector for each member of a batch, broadcast to x, runs in plain torch.
        factor: What the branch was multiplied with upstream. eps is multiplied by its square, so a
            power of two cancels to the last bit.

    Returns:
        [..., D], dtype of x.

    Raises:
        BadShape: branch, weight or gate does not fit x.
    """
    _check_same("gate_norm_residual", "branch", x, branch)
    _check_vector("gate_norm_residual", "weight", x, weight)
    if gate is not None:
        gate = _vector("gate_norm_residual", "gate", x, gate)
    if not _fused(x, branch, weight, gate) or _per_member(gate):
        return gate_norm_residual_torch(x, branch, weight, eps, gate, factor)
    run = _gate_norm_residual_op if torch.compiler.is_compiling() else _gate_norm_residual
    return run(x, branch, weight, eps, gate, factor)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head, then channels (2j, 2j + 1) turned by angle j; q and k in one pass.

    Args:
        q: [..., L, H, D], D even; any strides, slices of a common projection included.
        k: Shape of q.
        q_weight: [D].
        k_weight: [D].
        eps: Added to the mean square of a head.
        cos: Cosines of the angles, float32 [L, D / 2].
        sin: Sines, likewise.

    Returns:
        [..., L, H, D] twice, each in its dtype.

    Raises:
        BadShape: Something does not fit q, or D is odd.
    """
    name = "qk_norm_rope"
    if q.ndim < 3 or q.shape[-1] % 2:
        raise BadShape(f"{name}: q must be [..., L, H, D] with an even D, not of shape {tuple(q.shape)}")
    _check_same(name, "k", q, k)
    _check_vector(name, "q_weight", q, q_weight)
    _check_vector(name, "k_weight", k, k_weight)
    want = (q.shape[-3], q.shape[-1] // 2)
    for label, angles in (("cos", cos), ("sin", sin)):
        if tuple(angles.shape) != want:
            raise BadShape(f"{name}: {label} has shape {tuple(angles.shape)}, q wants {want}")
    if not _fused(q, k, q_weight, k_weight, cos, sin):
        return qk_norm_rope_torch(q, k, q_weight, k_weight, eps, cos, sin)
    run = _qk_norm_rope_op if torch.compiler.is_compiling() else _qk_norm_rope
    return run(q, k, q_weight, k_weight, eps, cos, sin)


def silu_gate(gate: Tensor, up: Tensor, factor: float = 1.0) -> Tensor:
    """silu(gate) * up * factor.

    Args:
        gate: [...], any strides.
        up: Shape of gate.
        factor: Applied in float32, before the one rounding: a power of two keeps a product in the
            range of float16.

    Returns:
        [...], dtype of gate.

    Raises:
        BadShape: The shapes differ.
    """
    _check_same("silu_gate", "up", gate, up)
    if not _fused(gate, up):
        return silu_gate_torch(gate, up, factor)
    run = _silu_gate_op if torch.compiler.is_compiling() else _silu_gate
    return run(gate, up, factor)


def _fused(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel runs: kernels know no gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (first, *others)):
        return False
    return kernels_for(first.device)


def _per_member(vector: Tensor | None) -> bool:
    return vector is not None and vector.ndim > 1


def _check_same(name: str, label: str, x: Tensor, other: Tensor) -> None:
    if other.shape != x.shape:
        raise BadShape(f"{name}: {label} has shape {tuple(other.shape)}, wanted that of x, {tuple(x.shape)}")


def _check_vector(name: str, label: str, x: Tensor, vector: Tensor) -> None:
    if x.shape[-1:] != vector.shape or x.ndim == 0:
        raise _misfit(name, label, x, vector)


def _vector(name: str, label: str, x: Tensor, vector: Tensor) -> Tensor:
    """[1, ..., 1, D] -> [D]; a vector for each member of a batch stays as it is."""
    if vector.ndim and vector.shape[-1] == x.shape[-1]:
        if vector.numel() == x.shape[-1]:
            return vector.reshape(-1)
        own, whole = vector.shape[::-1], x.shape[::-1]
        if len(own) <= len(whole) and all(a in (1, b) for a, b in zip(own, whole, strict=False)):
            return vector
    raise _misfit(name, label, x, vector)


def _misfit(name: str, label: str, x: Tensor, vector: Tensor) -> BadShape:
    size = x.shape[-1] if x.ndim else "D"
    return BadShape(
        f"{name}: {label} has shape {tuple(vector.shape)}, x of shape {tuple(x.shape)} wants [{size}]"
    )


# The functions below reach the kernels; Triton is imported at the first call, never before.


def _rms_norm_modulate(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    from zimage_core.kernels import elementwise as kernels

    return kernels.rms_norm_modulate(x, weight, eps, scale)


def _gate_norm_residual(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, gate: Tensor | None, factor: float
) -> Tensor:
    from zimage_core.kernels import elementwise as kernels

    return kernels.gate_norm_residual(x, branch, weight, eps, gate, factor)


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    from zimage_core.kernels import elementwise as kernels

    return kernels.qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin)


def _silu_gate(gate: Tensor, up: Tensor, factor: float) -> Tensor:
    from zimage_core.kernels import elementwise as kernels

    return kernels.silu_gate(gate, up, factor)


# Schemas are written out: they are what a saved graph depends on.
_rms_norm_modulate_op = torch.library.custom_op(
    "zimage::rms_norm_modulate",
    _rms_norm_modulate,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, Tensor? scale) -> Tensor",
)
_gate_norm_residual_op = torch.library.custom_op(
    "zimage::gate_norm_residual",
    _gate_norm_residual,
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor weight, float eps, Tensor? gate, float factor) -> Tensor",
)
_qk_norm_rope_op = torch.library.custom_op(
    "zimage::qk_norm_rope",
    _qk_norm_rope,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, Tensor sin) "
    "-> (Tensor, Tensor)",
)
_silu_gate_op = torch.library.custom_op(
    "zimage::silu_gate",
    _silu_gate,
    mutates_args=(),
    schema="(Tensor gate, Tensor up, float factor) -> Tensor",
)


@_rms_norm_modulate_op.register_fake
@_gate_norm_residual_op.register_fake
@_silu_gate_op.register_fake
def _like_the_first(first: Tensor, *others: object) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


@_qk_norm_rope_op.register_fake
def _like_q_and_k(q: Tensor, k: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _like_the_first(q), _like_the_first(k)
