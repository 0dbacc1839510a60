"""Products of a few rows with packed weights on a CPU, as when a language model writes one token at a time.

`ops.linear` dequantises a weight for each product; hundreds of rows share that, one row pays it alone. Here a
weight is put once into a form that is multiplied as it is. On a GPU nothing of this is used: few rows go to
the kernels that decode in their tiles (`dispatch.choose`).

    bfloat16   nibbles with bfloat16 scales (`cpu.int4`); x, scales and result are rounded to bfloat16, sums
               are float32. Int8 rows of a file stay int8, plain numbers and fp8 become dense bfloat16.
    exact      the same nibbles, with x and scales as sums of two bfloat16 numbers and the result in two
               steps: float32 to 1e-5. Q8_0 and fp8, and all where nibbles are slow, become dense float32;
               plain numbers stay.
    int8       int8 rows with one scale, as `compute="int8"` multiplies them (`quant.int8`)
    auto       bfloat16 for weights of up to four bits and plain numbers, int8 for the others, where this CPU
               is quick at these, else exact
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.cpu import int4, packed_int8
from zimage_core.cpu.capability import (
    bfloat16_pays,
    int4_pays,
    int8_one_row_pays,
    int8_pays,
    packed_int8_pays,
)
from zimage_core.cpu.int8 import LARGEST, LEAST, multiply_into
from zimage_core.cpu.rotation import rotate
from zimage_core.errors import BadArgument, printable
from zimage_core.quant import int8
from zimage_core.quant.tensor import QuantTensor

MODES = ("auto", "bfloat16", "exact", "int8")
"""Values of `mode`."""
MOST = 8
"""Most rows that are multiplied in this way; nibbles take each further row at the price of the first two."""

ROTATION = 64
"""Largest block of the rotation before int8, because single channels of a language model stand out; it is one
small product."""
SIMPLE = ("Q8_0",)
"""Formats that are dequantised in less time than their two digits take in the exact mode."""


@dataclass(frozen=True, eq=False)
class FewRows:
    """A weight in a form that few rows are multiplied with: x [..., K] -> [..., N] in x's dtype.

    Args:
        product: float [M, K] -> [M, N], any float type.
        shape: (N, K).
        mode: "bfloat16", "exact" or "int8".
        nbytes: Bytes that the form takes beside the weight.
        scale: Factor of the result, one number or one for each of N.
        rotation: Block of the Hadamard rotation that x needs before.
    """

    product: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    mode: str
    nbytes: int
    scale: Tensor | None = None
    rotation: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        flat = x if x.ndim == 2 else x.reshape(-1, self.shape[1])
        if self.rotation:
            flat = rotate(flat.float(), self.rotation)
        out = self.product(flat)
        if self.scale is not None:
            out = out.float().mul_(self.scale)
        if out.dtype != x.dtype:
            out = out.to(x.dtype)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], self.shape[0])


class Shared:
    """One product for several layers that read the same x, such as q, k and v.

    The layer that is called first computes the results of all, which the others take if they are called with
    the same tensor; nobody may write to it in between. Each result is taken once.

    Args:
        few: The weights below each other in one form.
        sizes: N of each layer.
    """

    def __init__(self, few: FewRows, sizes: Sequence[int]) -> None:
        self._few, self._sizes = few, list(sizes)
        self._kept: tuple[Tensor, dict[int, Tensor]] | None = None

    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """The product of each layer."""
        return [partial(self._part, i) for i in range(len(self._sizes))]

    def _part(self, i: int, x: Tensor) -> Tensor:
        kept = self._kept
        if kept is None or kept[0] is not x or i not in kept[1]:
            results = torch.split(self._few(x), self._sizes, -1)
            kept = self._kept = x, dict(enumerate(results))
        found = kept[1].pop(i)
        if not kept[1]:
            self._kept = None
        return found


@dataclass(frozen=True)
class Form:
    """What a weight would become.

    Args:
        kind: "nibbles", "dense", "bytes" (int8 times bfloat16), "int8" or "packed int8".
        mode: "bfloat16", "exact" or "int8".
        nbytes: Bytes beside the weight.
    """

    kind: str
    mode: str
    nbytes: int


def form_of(weight: Tensor | QuantTensor, mode: str) -> Form | None:
    """The form that a weight gets in a mode; None where it stays as it is.

    Args:
        weight: [N, K]; a dense one stays, it is multiplied at the speed of memory already.
        mode: One of `MODES`.

    Raises:
        BadArgument: There is no such mode.
    """
    if mode not in MODES:
        raise BadArgument(f"mode of decoding: got {printable(mode, 40)!r}, wanted one of {', '.join(MODES)}")
    if not isinstance(weight, QuantTensor) or weight.device.type != "cpu" or len(weight.shape) != 2:
        return None
    rows, width = weight.shape
    layout, given = int4.layout_of(weight.format), int8.is_int8(weight)
    if not rows * width:
        return None
    if mode == "auto":
        four_bits = layout is not None and layout.parts == 1 and int4_pays()
        plain = weight.format.is_float or weight.format.is_integer
        mode = "bfloat16" if four_bits or plain or not packed_int8_pays() else "int8"
        if mode == "bfloat16" and not (int4_pays() or bfloat16_pays()):
            mode = "exact"
    if mode == "int8":
        if given:
            return Form("int8", mode, 0)
        if packed_int8_pays() or int8_pays():
            kind = "packed int8" if packed_int8_pays() else "int8"
            return Form(kind, mode, rows * width + 12 * rows)
        mode = "exact"
    if layout is not None and int4_pays() and (mode == "bfloat16" or weight.format.name not in SIMPLE):
        full, group = -(-rows // int4.ROWS) * int4.ROWS, layout.packed_group
        depth = width * layout.parts
        if mode == "bfloat16":
            return Form("nibbles", mode, full * depth // 2 + full * depth // group * 4)
        return Form("nibbles", mode, full * (depth + group) // 2 + full * (depth // group + 1) * 8)
    if mode == "bfloat16" and given and int8_one_row_pays():
        return Form("bytes", mode, 0)
    if mode == "bfloat16" and not bfloat16_pays():
        mode = "exact"
    if mode == "exact" and (weight.format.is_float or weight.format.is_integer):
        return None  # widened slab by slab, they are as fast
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    return Form("dense", mode, 0 if weight.format.name == "BF16" else rows * width * dtype.itemsize)


def prepare(weight: Tensor | QuantTensor, mode: str = "auto") -> FewRows | None:
    """Put a weight into the form of a mode; it takes about as long as dequantising it twice.

    Args:
        weight: [N, K] on a CPU.
        mode: One of `MODES`.

    Returns:
        What multiplies a few rows by it, or None where nothing is faster than the weight as it is.
    """
    form = form_of(weight, mode)
    if form is None or not isinstance(weight, QuantTensor):
        return None
    with torch.no_grad(), torch.inference_mode(False):  # what is made outlives the caller's mode
        return _prepare(weight, form)


def _prepare(weight: QuantTensor, form: Form) -> FewRows:
    shape = weight.shape[0], weight.shape[1]
    product: Callable[[Tensor], Tensor]
    if "int8" in form.kind:
        given = int8.is_int8(weight)
        rotation = weight.rotation if given else min(int8.rotation_of(weight, rotated=True), ROTATION)
        if form.kind == "packed int8":
            product = _PackedInt8(weight, rotation)
        else:
            product = _Int8(weight if given else int8.quantize_weight(weight, rotation), rotation)
        return FewRows(product, shape, form.mode, form.nbytes)
    if form.kind == "bytes":
        product = _Bytes(weight)
    elif form.kind == "dense":
        plain = QuantTensor(weight.packed, weight.format, weight.shape)
        product = _Dense(plain.dequantize(torch.bfloat16 if form.mode == "bfloat16" else torch.float32))
    else:
        layout = int4.layout_of(weight.format)
        if layout is None:  # `form_of` has asked
            raise BadArgument(f"{weight.format.name} has no nibbles")
        nibbles = _Nibbles if form.mode == "bfloat16" else _ExactNibbles
        product = nibbles(weight, layout)
    scale = None if weight.scale is None else weight.scale.view(-1)
    return FewRows(product, shape, form.mode, form.nbytes, scale, weight.rotation)


class _Dense:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight)


class _Bytes:
    """bfloat16 times int8 rows as they are in a file."""

    def __init__(self, weight: QuantTensor) -> None:
        self.rows = weight.packed.view(torch.int8)
        self.ones = torch.ones(len(self.rows), dtype=torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), self.rows, self.ones)


def _values(rows: QuantTensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and float32 [N] of int8 rows."""
    scale = torch.ones(1) if rows.scale is None else rows.scale.view(-1)
    return rows.packed.view(torch.int8), scale.expand(rows.shape[0])


class _PackedInt8:
    """int8 rows in the order of FBGEMM, one row of x at a time."""

    def __init__(self, weight: QuantTensor, rotation: int) -> None:
        def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return _values(int8.quantize_weight(weight.rows(start, stop), rotation))

        self.rows, self.rotation = packed_int8.pack(rows, weight.shape[0]), rotation

    def __call__(self, x: Tensor) -> Tensor:
        wide = rotate(x.float(), self.rotation)
        rows = torch.split(wide, 1) if len(wide) > 1 else (wide,)
        results = [packed_int8.multiply(row, self.rows) for row in rows]
        return torch.cat(results) if len(results) > 1 else results[0]


class _Int8:
    """int8 rows, as `int8.linear` multiplies them, without what many rows need."""

    def __init__(self, rows: QuantTensor, rotation: int) -> None:
        self.values, self.scale = _values(rows)
        self.rotation = rotation

    def __call__(self, x: Tensor) -> Tensor:
        wide = rotate(x.float(), self.rotation)
        scale = wide.abs().amax(1, keepdim=True).clamp_(min=LEAST).div_(LARGEST)
        sums = torch.empty(len(x), len(self.values), dtype=torch.int32)
        multiply_into(sums, (wide / scale).round_().to(torch.int8), self.values)
        return (sums * self.scale).mul_(scale)


class _Nibbles:
    """x, scales and result in bfloat16, sums in float32."""

    def __init__(self, weight: QuantTensor, layout: int4.Layout) -> None:
        self.rows = weight.shape[0]
        self.planes = int4.pack(weight.packed, weight.format, layout)
        self.spread = int4.Spread(layout)

    def __call__(self, x: Tensor) -> Tensor:
        out = int4.multiply(self.spread(x), self.planes, self.planes.scales)
        return out if out.shape[1] == self.rows else out[:, : self.rows]


class _ExactNibbles:
    """x and scales as sums of two bfloat16 numbers, and the result as a sum of four.

    The first product gives y, rounded to bfloat16. The second one has a group of weights more, whose zeros
    are y and whose x is -1: its result is what the first one's rounding left. What a second part of x and of
    the scales adds is small, so that its own rounding does not matter.
    """

    def __init__(self, weight: QuantTensor, layout: int4.Layout) -> None:
        self.rows, self.group = weight.shape[0], layout.packed_group
        self.planes = int4.pack(weight.packed, weight.format, layout, rest=True, spare=1)
        self.spread = int4.Spread(layout)
        self.lock = threading.Lock()  # the last zeros of the scales are written to

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([self._row(row) for row in x.float()])

    def _row(self, x: Tensor) -> Tensor:
        planes, scales = self.planes, self.planes.scales
        near = x.bfloat16()
        parts = self.spread(torch.stack([near, (x - near).bfloat16()]))
        parts = functional.pad(parts, (0, self.group))
        with self.lock:
            zeros = scales[-1, :, 1]
            zeros.zero_()
            first = int4.multiply(parts[:1], planes, scales)
            zeros.copy_(first[0])
            parts[0, -1] = -1
            second = int4.multiply(parts, planes, scales)
        third = int4.multiply(parts[:1], planes, planes.rest if planes.rest is not None else scales)
        return torch.cat([first, second, third]).sum(0, dtype=torch.float32)[: self.rows]


def stacks_with(weight: QuantTensor, other: QuantTensor) -> bool:
    """Whether two weights can be put below each other: one format, width and device, and nothing beside."""
    alike = weight.format is other.format and weight.shape[1:] == other.shape[1:]
    return (
        alike
        and weight.device == other.device
        and not any(each.scale is not None or each.rotation for each in (weight, other))
    )


def stack(weights: Sequence[QuantTensor]) -> QuantTensor:
    """Weights below each other, copied; each `stacks_with` the first."""
    rows = sum(each.shape[0] for each in weights)
    packed = torch.cat([each.packed for each in weights])
    return weights[0].like(packed, shape=(rows, *weights[0].shape[1:]))
