"""Random packed weights and modules full of them, and the errors that a variant is judged by.

A matrix is 97 random rows over and over: enough for its values, quick to make at any size, and no divisor
of any tile, so that a kernel that mixes up two tiles is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.nn.compute import set_compute
from zimage_core.nn.linear import Linear
from zimage_core.quant.int8 import quantize_weight
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks

ROWS = 97


@lru_cache(maxsize=8)
def some_rows(name: str, width: int) -> tuple[Tensor, Tensor]:
    """Packed rows uint8 [97, row bytes] and their weights float32 [97, width] by the reference."""
    packed = random_blocks(FORMATS[name], (ROWS, width), np.random.default_rng(0))
    return torch.from_numpy(packed), torch.from_numpy(np.ascontiguousarray(reference(packed, name)))


def repeated(rows: Tensor, count: int) -> Tensor:
    """As many rows as `count`: those given, over and over."""
    return rows.repeat(-(-count // len(rows)), *[1] * (rows.ndim - 1))[:count]


def packed_matrix(name: str, n: int, k: int, device: torch.device) -> Tensor:
    """Random blocks, uint8 [n, row bytes]."""
    return repeated(some_rows(name, k)[0].to(device), n)


def dense_matrix(name: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights of `packed_matrix` by the reference, rounded to `dtype`; [n, k]."""
    return repeated(some_rows(name, k)[1].to(device).to(dtype), n)


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN and infinity come out as NaN."""
    size = want.double().norm()
    error = float((got.double() - want.double()).norm() / size) if size else float(got.double().norm())
    return error if np.isfinite(error) else float("nan")


def dequantize_error(got: Tensor, name: str) -> float:
    """Error of dense [n, k] against the reference; exactly 0 where every bit agrees after rounding."""
    n, k = got.shape
    want = some_rows(name, k)[1].to(got.device)
    rounded = want.to(got.dtype)
    worst = 0.0
    for start in range(0, n, ROWS * 8):  # slabs: float64 of a large matrix is four times its size
        piece = got[start : start + ROWS * 8]
        if not torch.equal(piece, repeated(rounded, len(piece))):
            error = relative_error(piece, repeated(want, len(piece)))
            worst = max(worst, error) if error == error else float("nan")
            if worst != worst:
                return worst
    return worst


def product_error(y: Tensor, x: Tensor, name: str, n: int) -> float:
    """Error of y [M, n] against float64 on the reference's weights; every element is compared."""
    want = x.double() @ some_rows(name, x.shape[1])[1].to(x.device).double().t()
    full = [y[:, i : i + ROWS].double() - want[:, : n - i] for i in range(0, n, ROWS)]
    wrong = sum(float(part.square().sum()) for part in full)
    right = sum(float(want[:, : n - i].square().sum()) for i in range(0, n, ROWS))
    error = (wrong / right) ** 0.5 if right else wrong
    return error if np.isfinite(error) else float("nan")


class Oracle(nn.Module):
    """A Linear in float32 over packed weights dequantised by plain torch, one matrix at a time."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = [linear]  # hidden from the module tree

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        ours = self.linear[0]
        bias = None if ours.bias is None else ours.bias.float()
        return functional.linear(x, dense_of(ours, torch.float32), bias)


def set_dense(linear: Linear, weight: Tensor) -> None:
    """Give a Linear a dense weight [out, in]."""
    linear.set_weight(nn.Parameter(weight, requires_grad=False))
    linear.dtype = weight.dtype


def dense_of(linear: Linear, dtype: torch.dtype) -> Tensor:
    """The weight of a Linear, dequantised by plain torch where it is packed."""
    weight = linear.weight
    if isinstance(weight, QuantTensor):
        return dense_matrix(weight.format.name, *weight.shape, dtype, weight.device)
    return weight.to(dtype)


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every Linear by its path."""
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def blank(
    build: Callable[[], nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    rounded: torch.dtype | None = None,
) -> nn.Module:
    """A model without memory for its matrices; gains of norms are random around 1, other vectors around 0.

    Two models have the same vectors; `rounded` rounds them to the dtype of the one that is judged.
    """
    with torch.device("meta"):
        model = build()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 1 or "token" in name:
                level = 1.0 if "norm" in type(module).__name__.lower() else 0.0
                values = level + 0.02 * torch.randn(parameter.shape, generator=generator)
                value = nn.Parameter(values.to(rounded or dtype).to(device, dtype), requires_grad=False)
                setattr(module, name, value)
    return model.eval()


def fill_packed(
    model: nn.Module, fmt: BlockFormat, dtype: torch.dtype, device: torch.device, least: int = 0
) -> nn.Module:
    """Give every Linear random weights: packed where K is whole blocks and >= `least`, else dense."""
    for _, module in linears(model):
        n, k = module.out_features, module.in_features
        if k % fmt.weights == 0 and k >= least:
            packed = packed_matrix(fmt.name, n, k, device).contiguous()
            module.assign(QuantTensor(packed, fmt, (n, k)), dtype)
        else:
            weight = torch.randn(n, k, device=device, dtype=torch.float32) * k**-0.5
            set_dense(module, weight.to(dtype))
    return model


def fill_dense(model: nn.Module, packed: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The weights of `packed`, dequantised."""
    for name, theirs in linears(packed):
        ours = model.get_submodule(name)
        set_dense(ours, dense_of(theirs, dtype))
        ours.bias = theirs.bias
    return model


def fill_int8(model: nn.Module, packed: nn.Module, device: torch.device, kept: bool) -> nn.Module:
    """The weights of `packed`, multiplied in int8; `kept`: as int8 rows in memory."""
    for name, theirs in linears(packed):
        ours = model.get_submodule(name)
        ours.set_weight(theirs.weight)
        ours.dtype, ours.bias = theirs.dtype, theirs.bias
    set_compute(model, "int8", device)
    for _, layer in linears(model):
        if kept and layer.rotation is not None:
            layer.set_weight(quantize_weight(layer.weight, layer.rotation))
    return model


def fill_oracle(model: nn.Module, packed: nn.Module) -> nn.Module:
    """Float32 over the weights of `packed`."""
    for name, theirs in list(linears(packed)):
        model.set_submodule(name, Oracle(theirs))
    return model
