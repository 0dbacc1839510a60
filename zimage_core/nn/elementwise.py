"""The element-wise steps of an S3-DiT block: float32 inside, rounded once at the end.

Each step checks shapes, then runs a Triton kernel if `dispatch.kernels_for` allows it and no gradient is
needed, else its function `*_torch` below. Both have the same order of operations. Under torch.compile a
kernel is one opaque operator of the namespace `zimage`. Two steps can end in int8 rows, for products of int8.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.errors import BadShape
from zimage_core.quant.dispatch import kernels_for
from zimage_core.quant.gpu import kernels_run
from zimage_core.quant.int8 import Int8Rows, quantize_rows

LONGEST = 1 << 14
"""Numbers of a row that a kernel holds to quantise it: `kernels.int8.LARGEST_ROW`, which imports Triton."""


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
    _check_weight("rms_norm_modulate", "weight", x, weight)
    scale = _vector("rms_norm_modulate", "scale", x, scale)
    if not _fused(x, weight, scale) or (scale is not None and scale.ndim > 1):
        return rms_norm_modulate_torch(x, weight, eps, scale)
    out: Tensor = _run("rms_norm_modulate", x, weight, eps, scale)
    return out


def rms_norm_modulate_torch(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """`rms_norm_modulate` in plain torch, unchecked."""
    # the vectors are multiplied first, which saves a pass over the activations
    gain = weight.float() if scale is None else weight.float() * (1 + scale.float())
    return (_unit(x, eps) * gain).to(x.dtype)


def rms_norm_modulate_int8(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor | None, rotation: int
) -> Int8Rows:
    """`rms_norm_modulate` as int8 rows; a kernel quantises the float32 result, which is never written.

    Args:
        x: [..., D].
        weight: [D].
        eps: As there.
        scale: As there.
        rotation: Block of the Hadamard rotation before the rows are quantised; 0 for none.

    Raises:
        BadShape: weight or scale does not fit x.
    """
    _check_weight("rms_norm_modulate", "weight", x, weight)
    scale = _vector("rms_norm_modulate", "scale", x, scale)
    if not _rows_fused(x, weight, scale) or (scale is not None and scale.ndim > 1):
        return quantize_rows(rms_norm_modulate(x, weight, eps, scale), rotation)
    flat = x.reshape(-1, x.shape[-1])
    values, factors = _int8_kernels().rms_norm_modulate(flat, weight, eps, scale, rotation)
    return Int8Rows(values, factors, tuple(x.shape[:-1]), x.dtype, rotation)


def gate_norm_residual(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """x + gate * weight * branch / rms(branch): a gated branch joins the residual stream.

    Args:
        x: [..., D], any strides.
        branch: [..., D], the output of the branch times `factor`.
        weight: [D].
        eps: Added to the mean square of the branch, as it is without `factor`.
        gate: D numbers with any leading axes of length 1, or None for 1. One vector for each member of a
            batch, broadcast to x, runs in plain torch.
        factor: Factor by which the branch was multiplied before. eps is multiplied by its square, so a power
            of two cancels exactly.

    Returns:
        [..., D], dtype of x.

    Raises:
        BadShape: branch, weight or gate does not fit x.
    """
    _check_same("gate_norm_residual", "branch", x, branch)
    _check_weight("gate_norm_residual", "weight", x, weight)
    gate = _vector("gate_norm_residual", "gate", x, gate)
    if not _fused(x, branch, weight, gate) or (gate is not None and gate.ndim > 1):
        return gate_norm_residual_torch(x, branch, weight, eps, gate, factor)
    out: Tensor = _run("gate_norm_residual", x, branch, weight, eps, gate, factor)
    return out


def gate_norm_residual_torch(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """`gate_norm_residual` in plain torch, unchecked."""
    gain = weight.float() if gate is None else weight.float() * gate.float()
    return torch.addcmul(x.float(), _unit(branch, eps * factor * factor), gain).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head, then a rotation of channels (2j, 2j + 1) by angle j; q and k in one pass.

    Args:
        q: [..., L, H, D], D even; any strides, slices of a common projection included.
        k: Shape of q.
        q_weight: [D].
        k_weight: [D].
        eps: Added to the mean square of a head.
        cos: Cosines of the angles, float32 [L, D / 2].
        sin: Sines of the angles, float32 [L, D / 2].

    Returns:
        [..., L, H, D] twice, each in its dtype.

    Raises:
        BadShape: Something does not fit q, or D is odd.
    """
    name = "qk_norm_rope"
    if q.ndim < 3 or q.shape[-1] % 2:
        raise BadShape(f"{name}: q must be [..., L, H, D] with an even D, not of shape {tuple(q.shape)}")
    _check_same(name, "k", q, k)
    _check_weight(name, "q_weight", q, q_weight)
    _check_weight(name, "k_weight", k, k_weight)
    want = (q.shape[-3], q.shape[-1] // 2)
    for label, angles in (("cos", cos), ("sin", sin)):
        if tuple(angles.shape) != want:
            raise BadShape(f"{name}: {label} has shape {tuple(angles.shape)}, q wants {want}")
    if not _fused(q, k, q_weight, k_weight, cos, sin):
        return qk_norm_rope_torch(q, k, q_weight, k_weight, eps, cos, sin)
    out: tuple[Tensor, Tensor] = _run(name, q, k, q_weight, k_weight, eps, cos, sin)
    return out


def qk_norm_rope_torch(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` in plain torch, unchecked."""
    rotation = torch.complex(cos.float(), sin.float()).unsqueeze(-2)

    def normed_and_rotated(x: Tensor, weight: Tensor) -> Tensor:
        # complex numbers give the same products in one pass instead of six
        normed = _unit(x, eps) * weight.float()
        pairs = torch.view_as_complex(normed.reshape(*x.shape[:-1], x.shape[-1] // 2, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

    return normed_and_rotated(q, q_weight), normed_and_rotated(k, k_weight)


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
    out: Tensor = _run("silu_gate", gate, up, factor)
    return out


def silu_gate_int8(gate: Tensor, up: Tensor, factor: float, rotation: int) -> Int8Rows:
    """`silu_gate` as int8 rows; a kernel quantises the float32 result, which is never written.

    Args:
        gate: [..., D].
        up: Shape of gate.
        factor: As there.
        rotation: Block of the Hadamard rotation before the rows are quantised; 0 for none.

    Raises:
        BadShape: The shapes differ.
    """
    _check_same("silu_gate", "up", gate, up)
    if not _rows_fused(gate, up):
        return quantize_rows(silu_gate(gate, up, factor), rotation)
    flat, other = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    values, factors = _int8_kernels().silu_gate(flat, other, factor, rotation)
    return Int8Rows(values, factors, tuple(gate.shape[:-1]), gate.dtype, rotation)


def silu_gate_torch(gate: Tensor, up: Tensor, factor: float = 1.0) -> Tensor:
    """`silu_gate` in plain torch, unchecked."""
    product = functional.silu(gate.float()) * up.float()
    return (product if factor == 1.0 else product * factor).to(gate.dtype)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _check_same(name: str, label: str, x: Tensor, other: Tensor) -> None:
    if other.shape != x.shape:
        raise BadShape(f"{name}: {label} has shape {tuple(other.shape)}, wanted that of x, {tuple(x.shape)}")


def _check_weight(name: str, label: str, x: Tensor, weight: Tensor) -> None:
    if x.shape[-1:] != weight.shape or x.ndim == 0:
        raise _misfit(name, label, x, weight)


def _vector(name: str, label: str, x: Tensor, vector: Tensor | None) -> Tensor | None:
    """[1, ..., 1, D] -> [D]; separate vectors for the members of a batch are returned unchanged."""
    if vector is None or vector.shape == x.shape[-1:]:
        return vector
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


def _fused(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel runs; kernels have no gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (first, *others)):
        return False
    run = kernels_for if torch.compiler.is_compiling() else kernels_run
    return run(first.device)


def _rows_fused(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel quantises the rows of a result, which it holds whole."""
    return _fused(first, *others) and not torch.compiler.is_compiling() and first.shape[-1] <= LONGEST


def _run(name: str, *arguments: Any) -> Any:
    """Call a kernel by its name; under torch.compile as an operator."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.zimage, name)(*arguments)
    return _kernel(name, *arguments)


def _kernel(name: str, *arguments: Any) -> Any:
    return getattr(_kernels(), name)(*arguments)


@cache
def _kernels() -> Any:
    from zimage_core.kernels import elementwise as kernels  # Triton is imported at the first call

    return kernels


@cache
def _int8_kernels() -> Any:
    from zimage_core.kernels import int8_steps as kernels  # Triton is imported at the first call

    return kernels


# The schemas are written out because saved graphs depend on them.
_SCHEMAS = {
    "rms_norm_modulate": "(Tensor x, Tensor weight, float eps, Tensor? scale) -> Tensor",
    "gate_norm_residual": "(Tensor x, Tensor branch, Tensor weight, float eps, Tensor? gate, float factor) "
    "-> Tensor",
    "qk_norm_rope": "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, "
    "Tensor sin) -> (Tensor, Tensor)",
    "silu_gate": "(Tensor gate, Tensor up, float factor) -> Tensor",
}


def _fake(outputs: int, *arguments: Any) -> Any:
    """Fake results of a kernel for tracing: contiguous tensors shaped like its first `outputs` arguments."""
    like = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments[:outputs]]
    return like[0] if outputs == 1 else tuple(like)


for _name, _schema in _SCHEMAS.items():
    _operator = torch.library.custom_op(
        f"zimage::{_name}", partial(_kernel, _name), mutates_args=(), schema=_schema
    )
    _operator.register_fake(partial(_fake, 2 if _name == "qk_norm_rope" else 1))
