"""Linear and Embedding over a weight that is dense or packed; the models do not know which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.errors import BadShape
from zimage_core.formats import BlockFormat
from zimage_core.quant import ops
from zimage_core.quant.tensor import QuantTensor

_DENSE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Weighted(nn.Module):
    """A module with one matrix, a parameter `weight` until `assign` brings a packed one.

    Packed bytes are the buffer `packed`, uint8, which `.to(dtype)` leaves alone and `.to(device)`
    moves. `dtype` follows `.to` like a dense weight's dtype would.
    """

    weight: nn.Parameter | None
    packed: Tensor | None

    def __init__(self, rows: int, columns: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.register_buffer("packed", None)
        self.dtype = self.weight.dtype
        self._shape = (rows, columns)
        self._format: BlockFormat | None = None
        self._scale: Tensor | None = None
        self._quant: QuantTensor | None = None
        nn.init.normal_(self.weight, std=std)

    def assign(self, quant: QuantTensor, dtype: torch.dtype | None = None) -> None:
        """Take over a weight from a file, without a copy.

        Plain numbers of the wanted dtype become the dense `weight` (without gradient, a view of the
        file's map); anything else stays packed and `weight` becomes None.

        Args:
            quant: The weight.
            dtype: Wanted of a dense weight and of an Embedding's result; None keeps the present one.

        Raises:
            BadShape: The shape is not this module's.
        """
        if tuple(quant.shape) != self._shape:
            raise BadShape(f"the file holds a matrix of shape {quant.shape}, this layer needs {self._shape}")
        self.dtype = dtype or self.dtype
        if _DENSE.get(quant.format.name) == self.dtype and quant.scale is None:
            self.weight = nn.Parameter(quant.dequantize(self.dtype), requires_grad=False)
            self.packed, self._format, self._scale, self._quant = None, None, None, None
            return
        self.weight = None
        self.packed, self._format, self._scale = quant.packed, quant.format, quant.scale
        self._quant = self.quant  # now, or a compiled graph would make it and be compiled again to find it

    @property
    def quant(self) -> QuantTensor | None:
        """The packed weight, None when it is dense; one object as long as the bytes stay where they are."""
        if self.packed is None or self._format is None:
            return None
        found = self._quant
        if found is None or found.packed is not self.packed or found.scale is not self._scale:
            self._quant = found = QuantTensor(self.packed, self._format, self._shape, self._scale)
        return found

    @property
    def device(self) -> torch.device:
        """Where the weight is, dense or packed."""
        return self._matrix().device

    def place(self, weight: QuantTensor | nn.Parameter) -> None:
        """Read the same weight, packed or dense, from another place: a slot, or its file again."""
        if isinstance(weight, QuantTensor):
            self.packed, self._scale, self._quant = weight.packed, weight.scale, weight
        else:
            self.weight = weight

    def exchange(self, weight: QuantTensor | nn.Parameter) -> QuantTensor | nn.Parameter:
        """Take another weight of the same shape, packed or dense, and give back the present one.

        Raises:
            BadShape: The shape is not this module's, or there is no weight to give back.
        """
        if tuple(weight.shape) != self._shape:
            raise BadShape(f"got a weight of shape {tuple(weight.shape)}, this layer needs {self._shape}")
        own = self._matrix()
        quant = weight if isinstance(weight, QuantTensor) else None
        self.weight = None if isinstance(weight, QuantTensor) else weight
        self.packed, self._format, self._scale, self._quant = None, None, None, quant
        if quant is not None:
            self.packed, self._format, self._scale = quant.packed, quant.format, quant.scale
        return own if isinstance(own, QuantTensor) else nn.Parameter(own, requires_grad=False)

    def make_resident(self, dtype: torch.dtype) -> None:
        """Replace the packed weight by a dense one on its device: faster, and larger (2 bytes a weight)."""
        quant = self.quant
        if quant is not None:
            self.weight = nn.Parameter(quant.dequantize(dtype), requires_grad=False)
            self.packed, self._format, self._scale, self._quant = None, None, None, None
            self.dtype = dtype

    def _matrix(self) -> Tensor | QuantTensor:
        if self.weight is not None:
            return self.weight
        quant = self.quant
        if quant is None:
            raise BadShape(f"this layer of shape {self._shape} has no weight; assign one first")
        return quant

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self._scale is not None:
            self._scale = self._scale.to(fn(self._scale).device)  # moved, never rounded
        self._quant = self.quant
        return self


class Linear(_Weighted):
    """x [..., in_features] -> [..., out_features] in x's dtype; see `ops.linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(out_features, in_features, in_features**-0.5)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return ops.linear(x, self._matrix(), self.bias)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        kind = self._format.name if self._format is not None else str(self.dtype)
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


class Embedding(_Weighted):
    """ids [...] -> [..., dim]; of a packed table only the rows asked for are read."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__(num, dim, 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., dim]."""
        return ops.embedding(ids, self._matrix(), self.dtype)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        kind = self._format.name if self._format is not None else str(self.dtype)
        return f"{self._shape[0]}, {self._shape[1]}, {kind}"
