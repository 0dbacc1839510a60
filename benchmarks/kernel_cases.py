"""The cases of packed weights: dequantising, and one product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import peers
from benchmarks.timing import Call, copies
from benchmarks.variants import Bench, Variant, run_case, short
from benchmarks.weights import dense_matrix, dequantize_error, packed_matrix, product_error
from zimage_core.cpu.dequantize import dequantize_into as by_torch
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant import int8, ops
from zimage_core.quant.tensor import QuantTensor

PEER_LIMIT = 2e-2
"""Largest error of diffusers, which computes in float16 whatever the dtype."""

INT8_LIMIT = 5e-2
"""Largest error of an int8 product; 1.3 % is usual."""


def formats(given: Sequence[str] | None) -> list[BlockFormat]:
    """The formats asked for; "all" means every block format, nothing Q4_K."""
    names = given or ("Q4_K",)
    if list(names) == ["all"]:
        return [fmt for fmt in FORMATS.values() if fmt.weights > 1]
    return [FORMATS[name] for name in names]


def dequant(bench: Bench, fmt: BlockFormat, n: int, k: int, case: str) -> None:
    """Packed [n, k] to dense, ours against diffusers."""
    device, dtype = bench.device, bench.dtype
    size, wide = fmt.row_bytes(k) * n, n * k * dtype.itemsize
    rotation, moved = copies(size, device), size + wide
    packed = [packed_matrix(fmt.name, n, k, device).clone() for _ in range(rotation)]
    outs = [torch.empty(n, k, dtype=dtype, device=device) for _ in range(copies(wide, device))]

    def error(call: Call) -> float:
        outs[0].fill_(float("nan"))
        found = call(0)
        return dequantize_error(outs[0] if found is None else found, fmt.name)

    variants = []
    if bench.no_kernels:
        variants.append(Variant("kernel", note=bench.no_kernels))
    else:
        from zimage_core.kernels.dequantize import dequantize_into as by_triton

        def kernel(i: int) -> None:
            by_triton(outs[i % len(outs)], packed[i], fmt)

        variants.append(Variant("kernel", kernel, partial(error, kernel), nbytes=moved, timed=bench.gpu))
    if not bench.gpu and dtype == torch.float32:

        def cpu(i: int) -> None:
            by_torch(outs[i % len(outs)], packed[i], fmt)

        variants.append(Variant("cpu", cpu, partial(error, cpu), nbytes=moved, capture=False))
    if missing := peers.why_no_diffusers(fmt):
        variants.append(Variant("diffusers", note=missing))
    else:
        theirs = [(peers.diffusers_parameter(p, fmt),) for p in packed]
        run = peers.diffusers_dequantize(dtype)
        about = {"limit": PEER_LIMIT, "nbytes": moved, "capture": False}
        variants += bench.with_compiled("diffusers", run, theirs, error, **about)
    head = {"what": "dequant", "case": case, "format": fmt.name, "n": n, "k": k}
    run_case(bench, head, variants, baseline="diffusers", rotation=rotation)


def matmul(bench: Bench, fmt: BlockFormat, n: int, k: int, m: int, case: str) -> None:
    """x [m, k] times packed [n, k]: as dispatched, dequantised first, fused, resident, and the peers."""
    device, dtype = bench.device, bench.dtype
    size = fmt.row_bytes(k) * n
    rotation = copies(size, device)
    packed = [packed_matrix(fmt.name, n, k, device).clone() for _ in range(rotation)]
    dense = [dense_matrix(fmt.name, n, k, dtype, device).clone() for _ in range(rotation)]
    x = torch.randn(m, k, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    scratch = torch.empty(n, k, dtype=dtype, device=device)
    around, wide = (x.numel() + m * n) * dtype.itemsize, n * k * dtype.itemsize
    limit = bench.limit(1e-2, 1e-5)

    def error(call: Call) -> float:
        return product_error(call(0), x, fmt.name, n)

    def ours(name: str, call: Call, nbytes: float, capture: bool = True, timed: bool = True) -> Variant:
        return Variant(name, call, partial(error, call), limit, nbytes + around, capture, timed)

    quant = [QuantTensor(p, fmt, (n, k)) for p in packed]
    variants = [ours("ops.linear", lambda i: ops.linear(x, quant[i]), size, bench.gpu)]
    if bench.no_kernels:
        variants += [Variant(name, note=bench.no_kernels) for name in ("dequantise + matmul", "fused")]
    else:
        from zimage_core.kernels.dequantize import dequantize_into as by_triton
        from zimage_core.kernels.matmul import matmul as product
        from zimage_core.kernels.planar import can_repack, repack

        def dequantize_first(i: int) -> Tensor:
            by_triton(scratch, packed[i], fmt)
            return functional.linear(x, scratch)

        variants.append(ours("dequantise + matmul", dequantize_first, size + 2 * wide, timed=bench.gpu))
        if can_repack(fmt, k):
            planes = [repack(p, fmt) for p in packed]
            fused = lambda i: product(x, planes[i], fmt, n)  # noqa: E731
            variants.append(ours("fused", fused, planes[0].nbytes, timed=bench.gpu))
        else:
            variants.append(Variant("fused", note=f"skipped: {fmt.name} has no planes at K = {k}"))
    if bench.gpu:
        kept = [int8.quantize_weight(each) for each in quant]
        call = lambda i: int8.linear(x, kept[i])  # noqa: E731
        variants.append(Variant("int8", call, partial(error, call), INT8_LIMIT, n * k + around))
    inputs = [(x, weight) for weight in dense]
    about = {"limit": limit, "nbytes": wide + around}
    variants += bench.with_compiled("resident", functional.linear, inputs, error, **about)
    about = {"limit": PEER_LIMIT, "nbytes": size + around}
    if missing := peers.why_no_diffusers(fmt):
        variants.append(Variant("diffusers", note=missing))
    else:
        inputs = [(x, peers.diffusers_parameter(p, fmt)) for p in packed]
        run = peers.diffusers_linear(dtype)
        variants += bench.with_compiled("diffusers", run, inputs, error, capture=False, **about)
    bits = peers.gemlite_bits(fmt)
    if bench.gpu and bits and peers.has("gemlite"):
        try:
            layers, weights = peers.gemlite(n, k, bits, dtype, rotation)
        except Exception as failure:  # noqa: BLE001 - another version of it may do anything
            variants.append(Variant("gemlite", note=f"skipped: {short(failure)}"))
        else:
            check = lambda: peers.gemlite_error(layers[0], x, weights)  # noqa: E731
            note = f"{bits} bits in groups of {peers.GEMLITE_GROUP}, other numbers"
            variants.append(Variant("gemlite", lambda i: layers[i](x), check, note=note, **about))
    head = {"what": "matmul", "case": case, "format": fmt.name, "n": n, "k": k, "m": m}
    run_case(bench, head, variants, 2.0 * m * n * k, "resident", rotation)
