"""What others do with the same bytes: diffusers' GGUF path, gemlite. Both may be absent."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.weights import linears, relative_error, set_dense
from zimage_core.formats import BlockFormat
from zimage_core.quant.tensor import QuantTensor

GEMLITE_GROUP = 64


def has(name: str) -> bool:
    """Whether a package is installed."""
    return find_spec(name) is not None


def why_no_diffusers(fmt: BlockFormat) -> str:
    """A sentence why diffusers cannot take part, empty where it can."""
    if not has("diffusers") or not has("gguf"):
        return "skipped: diffusers or gguf is not installed"
    import gguf
    from diffusers.quantizers.gguf import utils

    try:
        kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    except ValueError:
        return f"skipped: gguf lacks {fmt.name}"
    return "" if kind in utils.dequantize_functions else f"skipped: diffusers lacks {fmt.name}"


def diffusers_parameter(packed: Tensor, fmt: BlockFormat) -> Any:
    """diffusers' parameter over packed bytes."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter

    return GGUFParameter(packed, quant_type=gguf.GGMLQuantizationType(fmt.ggml_type))


def diffusers_dequantize(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    """diffusers' eager dequantiser, then the cast that its Linear does."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return lambda parameter: dequantize_gguf_tensor(parameter).to(dtype)


def diffusers_linear(dtype: torch.dtype) -> Callable[[Tensor, Any], Tensor]:
    """What diffusers' GGUFLinear does at every call."""
    dequantize = diffusers_dequantize(dtype)
    return lambda x, parameter: functional.linear(x, dequantize(parameter))


def with_diffusers(model: nn.Module, packed: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` with diffusers' GGUFLinear over the bytes of `packed`; dense matrices stay as they are."""
    from diffusers.quantizers.gguf.utils import GGUFLinear

    for name, ours in list(linears(packed)):
        weight = ours.weight
        if not isinstance(weight, QuantTensor):
            theirs = model.get_submodule(name)
            set_dense(theirs, weight)
            theirs.bias = ours.bias
            continue
        linear = GGUFLinear(ours.in_features, ours.out_features, ours.bias is not None, dtype, "meta")
        linear.weight = diffusers_parameter(weight.packed, weight.format)
        linear.bias = ours.bias
        model.set_submodule(name, linear)
    return model


def gemlite_bits(fmt: BlockFormat) -> int | None:
    """Bits of the gemlite weight that is nearest to a format; None where there is none."""
    return {4: 4, 8: 8, 2: 2}.get(int(fmt.bits_per_weight))


def gemlite(n: int, k: int, bits: int, dtype: torch.dtype, copies: int) -> tuple[list[Any], Tensor]:
    """Layers of gemlite with random codes in groups of 64, and their weights float64 [n, k].

    Their numbers are not those of a GGUF block: only the speed compares. The first call tunes for
    minutes unless its autotuner is told to be fast.
    """
    import gemlite as package
    from gemlite.helper import A16Wn

    if hasattr(package, "set_autotune"):
        package.set_autotune("fast")
    generator = torch.Generator("cuda").manual_seed(0)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.rand(n * k // GEMLITE_GROUP, 1, device="cuda", generator=generator) * 1e-2 + 1e-3
    zeros = torch.full_like(scales, (1 << bits) / 2)
    scales, zeros = scales.to(dtype), zeros.to(dtype)
    make = A16Wn(device="cuda:0")
    layers = [
        make.from_weights(codes.clone(), scales.clone(), zeros.clone(), bits, GEMLITE_GROUP)
        for _ in range(copies)
    ]
    groups = codes.view(-1, GEMLITE_GROUP).double()
    return layers, ((groups - zeros.double()) * scales.double()).view(n, k)


def gemlite_error(layer: Any, x: Tensor, weights: Tensor) -> float:
    """Error of one product against float64."""
    return relative_error(layer(x), x.double() @ weights.t())
