"""The parts of a step, each alone: all its products, all attention, all dequantising, all element-wise steps.

Each part is one CUDA graph of the calls of a step, with the same shapes and as often. The parts and the whole
step run in turn. What the whole needs beyond their sum are the gaps between kernels and a few small
operations. A part alone finds other data in the second-level cache than in a step, so the sum is not exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import cases, model_cases, step_cases
from benchmarks.timing import copies
from benchmarks.variants import Bench, Variant, run_case
from benchmarks.weights import blank, dequantize_error, fill_packed, packed_matrix, relative_error
from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.formats import BlockFormat
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn import elementwise as package

Size = tuple[int, int, TransformerConfig]
"""Pixels of a side, tokens of the caption, configuration."""
WEIGHTS = 2
"""Dense matrices of each shape that products take in turn; in a step all share one scratch buffer."""


def parts(bench: Bench, fmt: BlockFormat, pixels: int, caption: int, config: TransformerConfig) -> None:
    """All parts of one step, and the whole, replayed from a graph."""
    size = (pixels, caption, config)
    variants = [
        _whole(bench, fmt, size),
        _linears(bench, size),
        *_attention(bench, size),
        _dequantise(bench, fmt, size),
        _elementwise(bench, size),
    ]
    rows = cases.image_rows(pixels, config) + cases.padded(caption)
    head = {"what": "parts", "case": model_cases.step_name(*size), "format": fmt.name, "m": rows}
    run_case(bench, head | {"n": config.hidden_dim, "k": config.dim}, variants, baseline="whole")


def _whole(bench: Bench, fmt: BlockFormat, size: Size) -> Variant:
    """The step itself, which has to be finite; `model_cases.step` compares it with an oracle."""
    pixels, caption, config = size
    device, dtype = bench.device, bench.dtype
    model = fill_packed(blank(lambda: ZImageTransformer(config), dtype, device, dtype), fmt, dtype, device)
    side = pixels // AutoencoderConfig().spatial_factor
    latent = torch.randn(config.in_channels, 1, side, side, device=device)
    words = torch.randn(caption, config.cap_feat_dim, device=device).to(dtype)
    call = model_cases.stepper(model, latent, torch.full((1,), 0.5), words, replay=bench.gpu)

    def error() -> float:
        return 0.0 if torch.isfinite(call(0)).all() else float("nan")

    return Variant("whole", call, error, capture=False, flops=model_cases.step_flops(*size))


def _linears(bench: Bench, size: Size) -> Variant:
    """Every product over dense weights."""
    device, dtype = bench.device, bench.dtype
    found = cases.step_linears(*size)
    shapes = {(case.n, case.k) for case in found}
    weights = {
        (n, k): [(torch.randn(n, k, device=device) * k**-0.5).to(dtype) for _ in range(WEIGHTS)]
        for n, k in shapes
    }
    x = {(c.m, c.k): torch.randn(c.m, c.k, device=device).to(dtype) for c in found}

    def call(i: int) -> None:
        for case in found:
            for j in range(case.count):
                functional.linear(x[case.m, case.k], weights[case.n, case.k][j % WEIGHTS])

    def error() -> float:
        call(0)
        return max(_product_error(x[c.m, c.k][:16], weights[c.n, c.k][0]) for c in found)

    nbytes = sum(c.count * (c.n * c.k + c.m * (c.n + c.k)) * dtype.itemsize for c in found)
    flops = sum(case.count * case.flops for case in found)
    return Variant("linears", call, error, bench.limit(1e-2, 1e-5), nbytes, flops=flops)


def _product_error(x: Tensor, weight: Tensor) -> float:
    return relative_error(functional.linear(x, weight), x.double() @ weight.double().t())


def _attention(bench: Bench, size: Size) -> list[Variant]:
    """Every attention: the package's, then by the backends that a step can choose from."""
    found = cases.step_attention(*size)
    heads = [step_cases.attention_inputs(bench, case) for case in found]

    def variant(name: str, run: step_cases.Attention) -> Variant:
        def call(i: int) -> None:
            for case, given in zip(found, heads, strict=True):
                for _ in range(case.count):
                    run(*given)

        def error() -> float:
            call(0)
            return max(step_cases.attention_error(partial(run, *given), given) for given in heads)

        nbytes = sum(case.count * case.nbytes(bench.dtype.itemsize) for case in found)
        flops = sum(case.count * case.flops for case in found)
        label = "attention" if name == "nn.attention" else f"attention, {name}"
        limit = step_cases.INT8_LIMIT if name == "int8" else bench.limit(1e-2, 1e-5)
        return Variant(label, call, error, limit, nbytes, flops=flops)

    return [variant(name, run) for name, run in step_cases.attentions(bench, math=False).items()]


def _dequantise(bench: Bench, fmt: BlockFormat, size: Size) -> Variant:
    """Every packed weight into one scratch buffer; more copies than the cache holds, in rotation."""
    if not bench.gpu:
        from zimage_core.cpu.dequantize import dequantize_into
    elif bench.no_kernels:
        return Variant("dequantise", note=bench.no_kernels)
    else:
        from zimage_core.kernels.dequantize import dequantize_into
    device, dtype = bench.device, bench.dtype
    found = [case for case in cases.step_linears(*size) if case.k % fmt.weights == 0]
    shapes = {(case.n, case.k) for case in found}
    scratch = torch.empty(max(n * k for n, k in shapes), dtype=dtype, device=device)
    packed = {}
    for n, k in shapes:
        one = packed_matrix(fmt.name, n, k, device)
        packed[n, k] = [one.clone() for _ in range(copies(one.nbytes, device))]

    def dense(n: int, k: int) -> Tensor:
        return scratch[: n * k].view(n, k)

    def call(i: int) -> None:
        for case in found:
            given = packed[case.n, case.k]
            for j in range(case.count):
                dequantize_into(dense(case.n, case.k), given[j % len(given)], fmt)

    def error() -> float:
        worst = 0.0
        for n, k in shapes:
            scratch.fill_(float("nan"))
            dequantize_into(dense(n, k), packed[n, k][0], fmt)
            worst = max(worst, dequantize_error(dense(n, k), fmt.name))
        return worst

    nbytes = sum(c.count * (fmt.row_bytes(c.k) * c.n + c.n * c.k * dtype.itemsize) for c in found)
    return Variant("dequantise", call, error, 0.0, nbytes)


def _elementwise(bench: Bench, size: Size) -> Variant:
    """Every fused element-wise step."""
    device, dtype = bench.device, bench.dtype
    found = cases.step_elementwise(*size)
    given = {
        (case.name, case.rows): [step_cases.inputs_of(case, dtype, device, seed) for seed in range(2)]
        for case in found
    }
    runs: dict[str, Callable[..., Any]] = {name: getattr(package, name) for name in cases.STREAMS}

    def call(i: int) -> None:
        for case in found:
            inputs, run = given[case.name, case.rows], runs[case.name]
            for j in range(case.count):
                run(*inputs[j % len(inputs)])

    def error() -> float:
        errors = []
        for case in found:
            inputs = given[case.name, case.rows][0]
            want = step_cases.exact(case.name, inputs)
            errors.append(relative_error(step_cases.joined(runs[case.name](*inputs)), want))
        return max(errors)

    nbytes = sum(case.count * case.nbytes(dtype.itemsize) for case in found)
    return Variant("element-wise", call, error, bench.limit(1e-2, 1e-5), nbytes)
