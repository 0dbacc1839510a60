"""Products of int8 rows, `compute="int8"`: the arithmetic of `reference.int8` on every device.

A weight that is int8 already, of format I8 with a scale for each row, is used as it is. Every other weight is
quantised slab by slab inside the product; `quantize_weight` does it once, for weights that are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeGuard

import torch
from torch import Tensor

from zimage_core.cpu.capability import int8_pays
from zimage_core.cpu.int8 import decode_into, multiply_into, quantize_into
from zimage_core.cpu.pool import in_parallel
from zimage_core.cpu.rotation import rotate, rotation_group
from zimage_core.cpu.workspace import workspace
from zimage_core.errors import Unsupported
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant.tensor import QuantTensor, check_operands

I8 = FORMATS["I8"]

HEIGHT = 1024
"""Rows of a weight that are multiplied at a time: their int32 sums then stay in the cache until they are
scaled. From 512 rows on, the product is as fast as at once."""

SPREAD_FROM = 1 << 26
"""Number of multiplications from which on a matrix is divided among threads: 0.4 ms of work."""

QUANTIZE_FROM = 1 << 18
"""Numbers of x from which on its rows are divided among threads."""


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """Activations as int8, ready for several products.

    Args:
        values: int8 [M, K].
        scale: float32 [M].
        lead: Leading axes of the activations, whose product is M.
        dtype: Their dtype, which is that of the products.
        rotation: Block of the Hadamard rotation before they were quantised; 0 for none.
    """

    values: Tensor
    scale: Tensor
    lead: tuple[int, ...]
    dtype: torch.dtype
    rotation: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activations."""
        return (*self.lead, self.values.shape[1])

    @property
    def device(self) -> torch.device:
        """Their device."""
        return self.values.device

    def __mul__(self, factor: float) -> Int8Rows:
        """The activations times a number."""
        return Int8Rows(self.values, self.scale * factor, self.lead, self.dtype, self.rotation)

    def dequantize(self) -> Tensor:
        """The activations again [*shape], as far as int8 holds them."""
        wide = rotate(self.values.float() * self.scale.unsqueeze(1), self.rotation)
        return wide.to(self.dtype).view(self.shape)


@cache
def _gpu() -> Any:
    """The backend of GPUs, which imports this module."""
    return import_module("zimage_core.quant.gpu_int8")


def is_int8(weight: Tensor | QuantTensor) -> TypeGuard[QuantTensor]:
    """Whether a weight is int8 rows with their scales already."""
    if not isinstance(weight, QuantTensor):
        return False
    return weight.format.name == I8.name and weight.scale is not None and len(weight.shape) == 2


def rotation_of(weight: Tensor | QuantTensor, rotated: bool) -> int:
    """Block of the rotation for a product with a weight: that of its int8 rows, or the usual one.

    Args:
        weight: [N, K].
        rotated: Whether a weight that is not int8 yet is to be rotated.
    """
    if is_int8(weight):
        return weight.rotation
    return rotation_group(weight.shape[-1]) if rotated else 0


def quantize_rows(x: Tensor, rotation: int = 0) -> Int8Rows:
    """Quantise activations, one scale for each token.

    Args:
        x: [..., K], a float type, any strides.
        rotation: Block of the rotation before, which divides K; 0 for none.

    Raises:
        Unsupported: A gradient would have to pass through the rounding.
    """
    _refuse_gradients(x)
    width, lead = x.shape[-1], tuple(x.shape[:-1])
    flat = x.reshape(math.prod(lead), width)
    quantize = _rows_of if x.device.type == "cpu" else _gpu().quantize_rows
    values, scale = quantize(flat, rotation)
    return Int8Rows(values, scale, lead, x.dtype, rotation)


def quantize_weight(weight: Tensor | QuantTensor, rotation: int = 0) -> QuantTensor:
    """A weight [N, K] as int8 rows, a QuantTensor of format I8 with its scales and rotation."""
    if weight.device.type != "cpu":
        values, scale = _gpu().quantize_weight(weight, rotation)
    elif isinstance(weight, QuantTensor):
        values = torch.empty(weight.shape, dtype=torch.int8)
        scale = torch.empty(weight.shape[0], dtype=torch.float32)

        def share(start: int, stop: int) -> None:
            _decode(values[start:stop], scale[start:stop], weight, start, rotation)

        in_parallel(share, len(values))
    else:
        values, scale = _rows_of(weight.detach(), rotation)
    return QuantTensor(values.view(torch.uint8), I8, tuple(weight.shape), scale, rotation=rotation)


def linear(
    x: Tensor | Int8Rows, weight: Tensor | QuantTensor, bias: Tensor | None = None, rotated: bool = False
) -> Tensor:
    """x @ W^T + bias by int8 rows.

    Args:
        x: [..., K], a float type; or rows that were quantised for this weight.
        weight: [N, K], dense or packed.
        bias: [N] or None.
        rotated: Whether x and W are rotated, for a weight that is not int8 yet.

    Returns:
        [..., N] in x's dtype, rounded once.

    Raises:
        BadShape: K of x is not K of the weight, or the weight is no matrix.
        Unsupported: A gradient would have to pass through the product.
    """
    check_operands(x.shape, weight)
    _refuse_gradients(x, weight)
    rotation = rotation_of(weight, rotated)
    if isinstance(x, Int8Rows) and x.rotation != rotation:
        x = x.dequantize()  # rows that were made for another layer
    if torch.compiler.is_compiling():
        return _traced(x if isinstance(x, Tensor) else x.dequantize(), weight, bias, rotated)
    with torch.no_grad():
        if x.device.type != "cpu":
            product: Tensor = _gpu().linear(x, weight, bias, rotation)
            return product
        return _on_cpu(quantize_rows(x, rotation) if isinstance(x, Tensor) else x, weight, bias)


def _refuse_gradients(*operands: Tensor | QuantTensor | Int8Rows) -> None:
    if torch.is_grad_enabled() and any(isinstance(own, Tensor) and own.requires_grad for own in operands):
        raise Unsupported(
            "products in int8 give no gradients; run under torch.no_grad(), or choose the exact ones by "
            'pipe.set_compute("exact") or compute="exact"'
        )


def _on_cpu(x: Int8Rows, weight: Tensor | QuantTensor, bias: Tensor | None) -> Tensor:
    """The product slab by slab; a slab of a weight that is not int8 yet is quantised before it is used."""
    rows, width = weight.shape
    tokens = len(x.values)
    out = torch.empty(tokens, rows, dtype=torch.float32)
    kept = kept_scale = None
    if is_int8(weight) and weight.scale is not None:
        kept, kept_scale = weight.packed.view(torch.int8), weight.scale.view(-1).expand(rows)
    x_scale, device = x.scale.unsqueeze(1), x.device
    int8_pays()  # what it measures is not for a worker, which would change the number of threads

    def multiply(first: int, last: int) -> None:
        work = workspace("int8 slab", device)
        for start in range(first, last, HEIGHT):
            stop = min(start + HEIGHT, last)
            work.release()
            sums = work.take(torch.int32, tokens, stop - start)
            if kept is not None and kept_scale is not None:
                values, scale = kept[start:stop], kept_scale[start:stop]
            else:
                values = work.take(torch.int8, stop - start, width)
                scale = work.take(torch.float32, stop - start)
                _decode(values, scale, weight, start, x.rotation)
            multiply_into(sums, x.values, values)
            part = out[:, start:stop]
            part.copy_(sums).mul_(scale).mul_(x_scale)

    if out.numel():
        in_parallel(multiply, rows) if out.numel() * width >= SPREAD_FROM else multiply(0, rows)
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype).view(*x.lead, rows)


def _decode(values: Tensor, scale: Tensor, weight: Tensor | QuantTensor, start: int, rotation: int) -> None:
    """Rows of a weight from `start` on as int8."""
    stop = start + len(values)
    if isinstance(weight, QuantTensor):
        part = weight.rows(start, stop)
        decode_into(values, scale, part.packed, part.format, rotation)
        if part.scale is not None:
            scale.mul_(part.scale.view(-1))
    else:
        quantize_into(values, scale, weight.detach()[start:stop], rotation)


def _rows_of(x: Tensor, rotation: int) -> tuple[Tensor, Tensor]:
    """Rows [R, K] on a CPU as int8 [R, K] and scales [R]."""
    values = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(len(x), dtype=torch.float32)

    def share(start: int, stop: int) -> None:
        quantize_into(values[start:stop], scale[start:stop], x[start:stop], rotation)

    in_parallel(share, len(x)) if x.numel() >= QUANTIZE_FROM else share(0, len(x))
    return values, scale


def _traced(x: Tensor, weight: Tensor | QuantTensor, bias: Tensor | None, rotated: bool) -> Tensor:
    """The product as one operator, where torch.compile traces."""
    if isinstance(weight, QuantTensor):
        out: Tensor = _linear_op(
            x, weight.packed, weight.format.name, weight.scale, weight.rotation, bias, rotated
        )
        return out
    dense: Tensor = _linear_op(x, weight, "", None, 0, bias, rotated)
    return dense


# A graph of torch.compile holds this operator, which is opaque to the compiler.
@torch.library.custom_op("zimage::int8_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight: Tensor,
    format_name: str,
    scale: Tensor | None,
    rotation: int,
    bias: Tensor | None,
    rotated: bool,
) -> Tensor:
    if not format_name:
        return linear(x, weight, bias, rotated)
    fmt: BlockFormat = FORMATS[format_name]
    shape = (weight.shape[0], x.shape[-1])
    return linear(x, QuantTensor(weight, fmt, shape, scale, rotation=rotation), bias, rotated)


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
