"""The cases of packed weights: dequantising, one product; and what all cases ask about the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import peers
from benchmarks.contest import Bench, Contestant, contest
from benchmarks.timing import copies
from benchmarks.weights import (
    dense_matrix,
    dequantize_error,
    packed_matrix,
    product_error,
)
from zimage_core.cpu.dequantize import dequantize_into as by_torch
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant import ops
from zimage_core.quant.tensor import QuantTensor

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
        from zimage_core.kernels.dequantize import dequantize_into as by_triton

        def kernel(i: int) -> None:
            by_triton(outs[i % len(outs)], packed[i], fmt)

        contestants.append(Contestant("kernel", kernel, error(kernel), 0.0, moved, timed=timed))
    else:
        contestants.append(Contestant("kernel", note=why))
    if not bench.gpu and bench.dtype == torch.float32:

        def ours(i: int) -> None:
            by_torch(outs[i % len(outs)], packed[i], fmt)

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
        from zimage_core.kernels.dequantize import dequantize_into
        from zimage_core.kernels.matmul import matmul as product
        from zimage_core.kernels.planar import can_repack, repack

        def dequantize_first(i: int) -> Tensor:
            dequantize_into(scratch, packed[i], fmt)
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


def formats(given: list[str] | None, default: tuple[str, ...] = ("Q4_K",)) -> list[BlockFormat]:
    """The formats asked for; "all" means every block format."""
    names = given or default
    if list(names) == ["all"]:
        return [fmt for fmt in FORMATS.values() if fmt.weights > 1]
    return [FORMATS[name] for name in names]
