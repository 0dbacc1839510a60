"""The cases of single operations: dequantising, one product, one element-wise step, one attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases, peers
from benchmarks.contest import Bench, Contestant, contest
from benchmarks.timing import copies
from benchmarks.weights import (
    dense_matrix,
    dequantize_error,
    packed_matrix,
    product_error,
    relative_error,
)
from zimage_core import elementwise as fused
from zimage_core import elementwise_torch as plain
from zimage_core import ops
from zimage_core.cpu.dequantize import dequantize_into
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.nn.attention import attention
from zimage_core.nn.rope import rotation
from zimage_core.quant_tensor import QuantTensor

PEER_LIMIT = 2e-2
"""Of diffusers, which computes in float16, on every dtype."""
NO_KERNELS = "skipped: Triton kernels need a GPU"


def kernels(bench: Bench) -> tuple[bool, bool, str]:
    """(whether Triton kernels run, whether they are timed, why they do not run)."""
    if not peers.has("triton"):
        return False, False, "skipped: Triton is not installed"
    if bench.gpu:
        return True, True, ""
    return (True, False, "") if bench.given.interpret else (False, False, NO_KERNELS)


def late(bench: Bench) -> bool:
    """Whether the time of this part is used up."""
    return time.monotonic() > bench.deadline


def compiled(bench: Bench, name: str, call: Callable[..., Any], **about: Any) -> list[Contestant]:
    """The contestant `name` under torch.compile, where it was asked for."""
    if not bench.given.compile:
        return []
    about.setdefault("capture", False)
    return [Contestant(f"{name} compiled", call, **about)]


def dequant(bench: Bench, fmt: BlockFormat, n: int, k: int, case: str) -> None:
    """Packed [n, k] to dense, ours against diffusers."""
    runs, timed, why = kernels(bench)
    size = fmt.row_bytes(k) * n
    rotation = copies(size, bench.device)
    packed = [packed_matrix(fmt.name, n, k, bench.device).clone() for _ in range(rotation)]
    wide = n * k * bench.dtype.itemsize
    outs = [
        torch.empty(n, k, dtype=bench.dtype, device=bench.device) for _ in range(copies(wide, bench.device))
    ]
    moved = size + wide

    def error(run: Callable[[int], Any]) -> Callable[[], float]:
        def check() -> float:
            outs[0].fill_(float("nan"))
            found = run(0)
            return dequantize_error(outs[0] if found is None else found, fmt.name)

        return check

    contestants = []
    if runs:
        from zimage_core.kernels.dequantize import dequantize

        def kernel(i: int) -> None:
            dequantize(packed[i], fmt, outs[i % len(outs)])

        contestants.append(Contestant("kernel", kernel, error(kernel), 0.0, moved, timed=timed))
    else:
        contestants.append(Contestant("kernel", note=why))
    if not bench.gpu and bench.dtype == torch.float32:

        def ours(i: int) -> None:
            dequantize_into(outs[i % len(outs)], packed[i], fmt)

        contestants.append(Contestant("cpu", ours, error(ours), 0.0, moved, capture=False))
    missing = peers.why_no_diffusers(fmt)
    if missing:
        contestants.append(Contestant("diffusers", note=f"skipped: {missing}"))
    else:
        theirs = [peers.diffusers_parameter(p, fmt) for p in packed]
        run = peers.diffusers_dequantize(bench.dtype)

        def diffusers(i: int) -> Tensor:
            return run(theirs[i])

        contestants.append(
            Contestant("diffusers", diffusers, error(diffusers), PEER_LIMIT, moved, capture=False)
        )
        quick = torch.compile(run, dynamic=False) if bench.given.compile else run

        def diffusers_compiled(i: int) -> Tensor:
            return quick(theirs[i])

        check = error(diffusers_compiled)
        contestants += compiled(
            bench, "diffusers", diffusers_compiled, error=check, limit=PEER_LIMIT, nbytes=moved
        )
    head = {"what": "dequant", "case": case, "format": fmt.name, "n": n, "k": k}
    contest(bench, head, contestants, baseline=bench.given.baseline or "diffusers", rotation=rotation)


def matmul(bench: Bench, fmt: BlockFormat, n: int, k: int, m: int, case: str) -> None:
    """x [m, k] times packed [n, k]: fused, dequantised first, resident, through the door, and the peers."""
    device, dtype = bench.device, bench.dtype
    runs, timed, why = kernels(bench)
    size = fmt.row_bytes(k) * n
    rotation = copies(size, device)
    packed = [packed_matrix(fmt.name, n, k, device).clone() for _ in range(rotation)]
    dense = [dense_matrix(fmt.name, n, k, dtype, device).clone() for _ in range(rotation)]
    x = torch.randn(m, k, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    scratch = torch.empty(n, k, dtype=dtype, device=device)
    about = x.numel() * x.element_size() + m * n * x.element_size()
    wide = n * k * x.element_size()
    limit = bench.limit(1e-2, 1e-5)

    def entry(name: str, run: Callable[[int], Tensor], nbytes: float, **more: Any) -> Contestant:
        more.setdefault("limit", limit)
        error = more.pop("error", lambda: product_error(run(0), x, fmt.name, n))
        return Contestant(name, run, error, nbytes=nbytes, **more)

    quant = [QuantTensor(p, fmt, (n, k)) for p in packed]
    contestants = [entry("ops.linear", lambda i: ops.linear(x, quant[i]), size + about, capture=bench.gpu)]
    if runs:
        from zimage_core.kernels.dequantize import dequantize
        from zimage_core.kernels.matmul import matmul as product
        from zimage_core.kernels.planar import can_repack, repack

        def dequantize_first(i: int) -> Tensor:
            dequantize(packed[i], fmt, scratch)
            return functional.linear(x, scratch)

        contestants.append(
            entry("dequantise + matmul", dequantize_first, size + 2 * wide + about, timed=timed)
        )
        if can_repack(fmt, k):
            planes = [repack(p, fmt) for p in packed]
            moved = planes[0].nbytes + about
            contestants.append(entry("fused", lambda i: product(x, planes[i], fmt, n), moved, timed=timed))
        else:
            contestants.append(Contestant("fused", note=f"skipped: {fmt.name} has no planes at K = {k}"))
    else:
        contestants += [Contestant(name, note=why) for name in ("dequantise + matmul", "fused")]
    contestants.append(entry("resident", lambda i: functional.linear(x, dense[i]), wide + about))
    if bench.given.compile:
        quick = torch.compile(functional.linear, dynamic=False)
        call = lambda i: quick(x, dense[i])  # noqa: E731
        contestants += compiled(
            bench, "resident", call, nbytes=wide + about, limit=limit,
            error=lambda: product_error(call(0), x, fmt.name, n),
        )  # fmt: skip
    contestants += _peer_products(bench, fmt, n, k, x, packed, size + about)
    head = {"what": "matmul", "case": case, "format": fmt.name, "n": n, "k": k, "m": m}
    contest(bench, head, contestants, 2.0 * m * n * k, bench.given.baseline or "resident", rotation)


def _peer_products(
    bench: Bench, fmt: BlockFormat, n: int, k: int, x: Tensor, packed: list[Tensor], moved: float
) -> list[Contestant]:
    found = []
    missing = peers.why_no_diffusers(fmt)
    if missing:
        found.append(Contestant("diffusers", note=f"skipped: {missing}"))
    else:
        theirs = [peers.diffusers_parameter(p, fmt) for p in packed]
        run = peers.diffusers_linear(bench.dtype)
        quick = torch.compile(run, dynamic=False) if bench.given.compile else run

        def diffusers(i: int) -> Tensor:
            return run(x, theirs[i])

        def diffusers_compiled(i: int) -> Tensor:
            return quick(x, theirs[i])

        about: dict[str, Any] = {"limit": PEER_LIMIT, "nbytes": moved, "capture": False}
        check = lambda: product_error(diffusers(0), x, fmt.name, n)  # noqa: E731
        found.append(Contestant("diffusers", diffusers, check, **about))
        check_quick = lambda: product_error(diffusers_compiled(0), x, fmt.name, n)  # noqa: E731
        found += compiled(bench, "diffusers", diffusers_compiled, error=check_quick, **about)
    bits = peers.gemlite_bits(fmt)
    if bench.gpu and bits and peers.has("gemlite"):
        try:
            layers, weights = peers.gemlite(n, k, bits, bench.dtype, len(packed))
            found.append(
                Contestant(
                    "gemlite", lambda i: layers[i](x), lambda: peers.gemlite_error(layers[0], x, weights),
                    PEER_LIMIT, moved, note=f"{bits} bits in groups of {peers.GEMLITE_GROUP}, other numbers",
                )
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - another version of it may do anything
            found.append(Contestant("gemlite", note=f"skipped: {type(error).__name__}: {error}"[:160]))
    return found


def elementwise(bench: Bench, case: cases.ElementwiseCase) -> None:
    """One fused step: the kernel against its twin in plain torch."""
    runs, timed, why = kernels(bench)
    name, device, dtype = case.name, bench.device, bench.dtype
    rotation = copies(case.nbytes(dtype.itemsize), device)
    inputs = [_elementwise_inputs(case, dtype, device, seed) for seed in range(rotation)]
    want = _elementwise_truth(name, inputs[0])
    limit = bench.limit(1e-2, 1e-5)
    twin = getattr(plain, f"{name}_torch")
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


def formats(given: list[str] | None, default: tuple[str, ...] = ("Q4_K",)) -> list[BlockFormat]:
    """The formats asked for; "all" means every block format."""
    names = given or default
    if list(names) == ["all"]:
        return [fmt for fmt in FORMATS.values() if fmt.weights > 1]
    return [FORMATS[name] for name in names]


__all__ = ["attend", "dequant", "elementwise", "formats", "kernels", "late", "matmul", "rotation"]
