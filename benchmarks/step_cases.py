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

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def elementwise(bench: Bench, case: cases.ElementwiseCase) -> None:
    """One fused step: the kernel, its twin in plain torch, what the models call, and diffusers' rounding."""
    name, device, dtype = case.name, bench.device, bench.dtype
    moved = case.nbytes(dtype.itemsize)
    rotation = copies(moved, device)
    inputs = [_inputs(case, dtype, device, seed) for seed in range(rotation)]
    want = _exact(name, inputs[0])
    about = {"limit": bench.limit(1e-2, 1e-5), "nbytes": moved}

    def error(call: Call) -> float:
        return relative_error(_joined(call(0)), want)

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


def _inputs(
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


def _exact(name: str, inputs: Any) -> Tensor:
    """A step in float64."""
    wide = [v.double() if isinstance(v, Tensor) else v for v in inputs]
    return _joined(
        _step(name, wide, lambda x, weight, eps: x / (x.square().mean(-1, True) + eps).sqrt() * weight)
    )


def _rounded_each(name: str, *inputs: Any) -> Any:
    """A step as diffusers computes it: rounded after the norm, after its weight, after each factor."""

    def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    return _step(name, inputs, normed)


def _joined(found: Any) -> Tensor:
    return torch.cat(found) if isinstance(found, tuple) else found


def attend(bench: Bench, case: cases.AttentionCase) -> None:
    """The package's attention against each backend of torch on a batch of one."""
    device, dtype = bench.device, bench.dtype
    q, k, v = (torch.randn(case.length, case.heads, case.head_dim, device=device).to(dtype) for _ in range(3))
    picked = min(32, case.length)
    a, b, c = (t[:, :1].double().transpose(0, 1) for t in (q, k, v))
    scores = a[:, :picked] @ b.transpose(1, 2) / case.head_dim**0.5
    want = (scores.softmax(-1) @ c)[0]

    def backend(choice: Any) -> Call:
        def run(i: int) -> Tensor:
            with sdpa_kernel(choice):
                heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
                out = functional.scaled_dot_product_attention(*heads)
            return out[0].transpose(0, 1).flatten(1)

        return run

    runs: dict[str, Call] = {"nn.attention": lambda i: attention(q, k, v)}
    for name in BACKENDS if bench.gpu else ("flash",):
        if hasattr(SDPBackend, BACKENDS[name]):
            runs[name] = backend(getattr(SDPBackend, BACKENDS[name]))
    runs["math"] = backend(SDPBackend.MATH)
    limit, moved = bench.limit(1e-2, 1e-5), case.nbytes(dtype.itemsize)

    def error(call: Call) -> float:
        return relative_error(call(0)[:picked, : case.head_dim], want)

    variants = [Variant(name, run, partial(error, run), limit, moved) for name, run in runs.items()]
    head = {"what": "attention", "case": case.name, "m": case.length, "n": case.heads, "k": case.head_dim}
    run_case(bench, head | {"count": case.count}, variants, case.flops, "flash")
