"""Packed weights and layers to multiply with, and the bound on their products."""

from __future__ import annotations

import numpy as np
import torch

from zimage_core.formats import FORMATS
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks

HALF = torch.float16


def quant(
    name: str, rows: int, width: int, device: torch.device, scale: torch.Tensor | None = None
) -> QuantTensor:
    packed = random_blocks(FORMATS[name], (rows, width), np.random.default_rng(rows + width))
    weight = QuantTensor(torch.from_numpy(packed), FORMATS[name], (rows, width), scale)
    return weight.to(device)


def random_x(*shape: int, device: torch.device, dtype: torch.dtype = HALF, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def dense(weight: QuantTensor) -> torch.Tensor:
    """float64 [N, K] by the NumPy reference."""
    w = torch.from_numpy(reference(weight.packed.cpu().numpy(), weight.format.name)).double()
    return w if weight.scale is None else w * weight.scale.cpu().double().view(-1, 1)


def assert_product(
    got: torch.Tensor, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None
) -> None:
    """Weights, bias and result rounded to x's dtype once each, and float32 sums of K + 2 terms.

    A rounding is half a unit in the last place, or a whole one where the interpreter truncates to bfloat16.
    """
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], weight.shape[0])
    x64, w = x.cpu().double(), dense(weight)
    exact, size = x64 @ w.T, x64.abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.cpu().double(), size + bias.cpu().double().abs()
    once = {torch.float32: 2.0**-24, HALF: 2.0**-11, torch.bfloat16: 2.0**-7}[x.dtype]
    sums = 2.0**-24 if x.device.type == "cpu" or x.dtype == torch.float32 else 2.0**-22
    allowed = (2.5 * once + (x.shape[-1] + 2) * sums) * size + 2.0**-24
    wrong = ~((got.cpu().double() - exact).abs() <= allowed)
    assert not wrong.any(), (
        f"{weight.format.name} {x.dtype}: {int(wrong.sum())} of {wrong.numel()} elements are off, "
        f"the first at {wrong.nonzero()[0].tolist()}"
    )


def packed_layer(name: str, rows: int, width: int, device: torch.device, bias: bool = False) -> Linear:
    layer = Linear(width, rows, bias=bias).to(device)
    layer.assign(quant(name, rows, width, device))
    return layer
