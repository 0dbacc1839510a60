"""The cases of what lies between products: one element-wise step, one attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases
from benchmarks.timing import Call, copies
from benchmarks.variants import Bench, Variant, run_case
from benchmarks.weights import relative_error
from zimage_core.nn import elementwise as package
from zimage_core.nn.attention import attention

Attention = Callable[..., Tensor]
"""q, k and v [L, H, D] -> [L, H * D]."""
INT8_LIMIT = 5e-2
"""Largest error of attention with q k^T in int8; 0.9 % is usual."""
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def elementwise(bench: Bench, case: cases.ElementwiseCase) -> None:
    """One fused step: the kernel, its twin in plain torch, what the models call, and diffusers' rounding."""
    name, device, dtype = case.name, bench.device, bench.dtype
    moved = case.nbytes(dtype.itemsize)
    rotation = copies(moved, device)
    inputs = [inputs_of(case, dtype, device, seed) for seed in range(rotation)]
    want = exact(name, inputs[0])
    about = {"limit": bench.limit(1e-2, 1e-5), "nbytes": moved}

    def error(call: Call) -> float:
        return relative_error(joined(call(0)), want)

    def ours(label: str, run: Callable[..., Any], **more: Any) -> Variant:
        call = _keeping(run, inputs)
        return Variant(label, call, partial(error, call), **about | more)

    twin = getattr(package, f"{name}_torch")
    if bench.no_kernels:
        variants = [Variant("kernel", note=bench.no_kernels)]
    else:
        from zimage_core.kernels import elementwise as kernels

        variants = [ours("kernel", getattr(kernels, name), timed=bench.gpu)]
    variants += [ours("torch", twin), ours("elementwise." + name, getattr(package, name))]
    variants.append(ours("torch, rounded after each factor", partial(_rounded_each, name)))
    if bench.given.compile:
        variants.append(ours("torch compiled", torch.compile(twin, dynamic=False), capture=False))
    head = {"what": "elementwise", "case": name, "m": case.rows, "n": case.size * case.heads}
    run_case(bench, head, variants, baseline="torch", rotation=rotation)


def _keeping(run: Callable[..., Any], inputs: list[Any]) -> Call:
    """Call i on inputs i. The result is kept, so that the next one lies elsewhere and not in a cache."""
    kept: list[Any] = [None] * len(inputs)

    def call(i: int) -> Any:
        kept[i] = run(*inputs[i])
        return kept[i]

    return call


def inputs_of(
    case: cases.ElementwiseCase, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Any, ...]:
    """The arguments of a step, gains of norms around 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    eps = cases.TRANSFORMER.norm_eps
    rows, size = case.rows, case.size
    if case.name == "qk_norm_rope":
        q, k = random(rows, case.heads, size), random(rows, case.heads, size)
        angle = torch.randn(rows, size // 2, device=device, generator=generator)
        return q, k, 1 + random(size), 1 + random(size), eps, angle.cos(), angle.sin()
    x = random(rows, size)
    if case.name == "rms_norm_modulate":
        return x, 1 + random(size), eps, random(size).float()
    if case.name == "silu_gate":
        return x, random(rows, size), 1.0
    return x, random(rows, size), 1 + random(size), eps, random(size).float(), 1.0


def _step(name: str, inputs: Any, normed: Callable[[Tensor, Tensor, float], Tensor]) -> Any:
    """A step written out with a given RMSNorm (x, weight, eps); every operation rounds to its dtype."""
    if name == "rms_norm_modulate":
        x, weight, eps, scale = inputs
        return normed(x, weight, eps) * (1 + scale.to(x.dtype))
    if name == "silu_gate":
        gate, up, factor = inputs
        return functional.silu(gate) * up * factor
    if name == "gate_norm_residual":
        x, branch, weight, eps, gate, factor = inputs
        return x + gate.to(x.dtype) * normed(branch, weight, eps * factor**2)
    q, k, q_weight, k_weight, eps, cos, sin = inputs
    cos, sin = cos[:, None], sin[:, None]
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        even, odd = normed(x, weight, eps).to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
        rotated.append(turned.flatten(-2).to(x.dtype))
    return tuple(rotated)


def exact(name: str, inputs: Any) -> Tensor:
    """A step in float64."""
    wide = [v.double() if isinstance(v, Tensor) else v for v in inputs]
    return joined(
        _step(name, wide, lambda x, weight, eps: x / (x.square().mean(-1, True) + eps).sqrt() * weight)
    )


def _rounded_each(name: str, *inputs: Any) -> Any:
    """A step as diffusers computes it: rounded after the norm, after its weight, after each factor."""

    def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    return _step(name, inputs, normed)


def joined(found: Any) -> Tensor:
    return torch.cat(found) if isinstance(found, tuple) else found


def attend(bench: Bench, case: cases.AttentionCase) -> None:
    """The package's attention against each backend of torch on a batch of one."""
    heads = attention_inputs(bench, case)
    limit, moved = bench.limit(1e-2, 1e-5), case.nbytes(bench.dtype.itemsize)
    found = {name: partial(run, *heads) for name, run in attentions(bench).items()}
    variants = [
        Variant(name, lambda i, run=run: run(), partial(attention_error, run, heads), most, moved)
        for name, run in found.items()
        for most in [INT8_LIMIT if name == "int8" else limit]
    ]
    head = {"what": "attention", "case": case.name, "m": case.length, "n": case.heads, "k": case.head_dim}
    run_case(bench, head | {"count": case.count}, variants, case.flops, "flash")


def attention_inputs(bench: Bench, case: cases.AttentionCase) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v [length, heads, head size]."""
    shape = (case.length, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=bench.device).to(bench.dtype) for _ in range(3))
    return q, k, v


def attentions(bench: Bench, math: bool = True) -> dict[str, Attention]:
    """The package's attention, its kernel with q k^T in int8, and each backend of torch by its name.

    `math` builds the matrix of scores.
    """

    def backend(choice: Any) -> Attention:
        def run(*heads: Tensor) -> Tensor:
            with sdpa_kernel(choice):
                out = functional.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in heads))
            return out[0].transpose(0, 1).flatten(1)

        return run

    found: dict[str, Attention] = {"nn.attention": attention}
    if bench.gpu and not bench.no_kernels and bench.dtype != torch.float32:
        from zimage_core.kernels import attention_int8 as kernels

        found["int8"] = lambda *heads: kernels.attention(*(t[None] for t in heads))[0]
    for name in BACKENDS if bench.gpu else ("flash",):
        if hasattr(SDPBackend, BACKENDS[name]):
            found[name] = backend(getattr(SDPBackend, BACKENDS[name]))
    return found | ({"math": backend(SDPBackend.MATH)} if math else {})


def attention_error(run: Callable[[], Tensor], heads: tuple[Tensor, Tensor, Tensor]) -> float:
    """Error of the first queries of the first head against float64."""
    length, _, size = heads[0].shape
    picked = min(32, length)
    a, b, c = (t[:, 0].double() for t in heads)
    want = (a[:picked] @ b.t() / size**0.5).softmax(-1) @ c
    return relative_error(run()[:picked, :size], want)
