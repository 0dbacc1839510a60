"""The cases of steps between products: one element-wise step, one attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases
from benchmarks.contest import Bench, Contestant, contest
from benchmarks.kernel_cases import compiled, kernels
from benchmarks.timing import copies
from benchmarks.weights import relative_error
from zimage_core.nn import elementwise as fused
from zimage_core.nn.attention import attention


def elementwise(bench: Bench, case: cases.ElementwiseCase) -> None:
    """One fused step: the kernel against its twin in plain torch."""
    runs, timed, why = kernels(bench)
    name, device, dtype = case.name, bench.device, bench.dtype
    rotation = copies(case.nbytes(dtype.itemsize), device)
    inputs = [_elementwise_inputs(case, dtype, device, seed) for seed in range(rotation)]
    want = _elementwise_truth(name, inputs[0])
    limit = bench.limit(1e-2, 1e-5)
    twin = getattr(fused, f"{name}_torch")
    moved = case.nbytes(dtype.itemsize)

    def error(run: Callable[[int], Any]) -> Callable[[], float]:
        return lambda: relative_error(_joined(run(0)), want)

    torch_twin = _keeping(twin, inputs)
    if runs:
        from zimage_core.kernels import elementwise as source

        ours = _keeping(getattr(source, name), inputs)

        contestants = [Contestant("kernel", ours, error(ours), limit, moved, timed=timed)]
    else:
        contestants = [Contestant("kernel", note=why)]
    contestants.append(Contestant("torch", torch_twin, error(torch_twin), limit, moved))

    door = _keeping(getattr(fused, name), inputs)
    contestants.append(Contestant("elementwise." + name, door, error(door), limit, moved))
    quick = torch.compile(twin, dynamic=False) if bench.given.compile else twin
    twin_compiled = _keeping(quick, inputs)
    contestants += compiled(
        bench, "torch", twin_compiled, error=error(twin_compiled), limit=limit, nbytes=moved
    )
    head = {"what": "elementwise", "case": name, "m": case.rows, "n": case.size * case.heads}
    contest(bench, head, contestants, baseline=bench.given.baseline or "torch", rotation=rotation)


def _keeping(run: Callable[..., Any], inputs: list[Any]) -> Callable[[int], Any]:
    """Call i on inputs i. The result is kept, so that the next one lies elsewhere and not in a cache."""
    kept: list[Any] = [None] * len(inputs)

    def call(i: int) -> Any:
        kept[i] = run(*inputs[i])
        return kept[i]

    return call


def _elementwise_inputs(
    case: cases.ElementwiseCase, dtype: torch.dtype, device: torch.device, seed: int
) -> Any:
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
        return x, 1 + random(size), eps, random(size)
    if case.name == "silu_gate":
        return x, random(rows, size), 1.0
    return x, random(rows, size), 1 + random(size), eps, random(size), 1.0


def _elementwise_truth(name: str, inputs: Any) -> Tensor:
    """The step written out in float64."""
    wide = [v.double() if isinstance(v, Tensor) else v for v in inputs]

    def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    if name == "rms_norm_modulate":
        x, weight, eps, scale = wide
        return normed(x, weight, eps) * (1 + scale)
    if name == "silu_gate":
        gate, up, factor = wide
        return gate / (1 + (-gate).exp()) * up * factor
    if name == "gate_norm_residual":
        x, branch, weight, eps, gate, factor = wide
        return x + gate.tanh() * normed(branch, weight, eps * factor**2)
    q, k, q_weight, k_weight, eps, cos, sin = wide
    cos, sin = cos[:, None], sin[:, None]
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        even, odd = normed(x, weight, eps).unflatten(-1, (-1, 2)).unbind(-1)
        turned.append(torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2))
    return torch.cat(turned)


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

    def error(run: Callable[[int], Tensor]) -> Callable[[], float]:
        return lambda: relative_error(run(0)[:picked, : case.head_dim], want)

    def backend(choice: Any) -> Callable[[int], Tensor]:
        def run(i: int) -> Tensor:
            with sdpa_kernel(choice):
                heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
                out = functional.scaled_dot_product_attention(*heads)
            return out[0].transpose(0, 1).flatten(1)

        return run

    runs: dict[str, Callable[[int], Tensor]] = {"nn.attention": lambda i: attention(q, k, v)}
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    for name in ("flash", "cudnn", "efficient") if bench.gpu else ("flash",):
        if hasattr(SDPBackend, names[name]):
            runs[name] = backend(getattr(SDPBackend, names[name]))
    runs["math"] = backend(SDPBackend.MATH)
    limit, moved = bench.limit(1e-2, 1e-5), case.nbytes(dtype.itemsize)
    found = [Contestant(name, run, error(run), limit, moved) for name, run in runs.items()]
    head = {"what": "attention", "case": case.name, "m": case.length, "n": case.heads, "k": case.head_dim}
    contest(bench, head | {"count": case.count}, found, case.flops, bench.given.baseline or "flash")
