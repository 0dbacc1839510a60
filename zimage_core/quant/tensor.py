"""`QuantTensor`: a packed weight, which is the bytes of a file with their format and shape.

It is no subclass of torch.Tensor, so nothing converts it implicitly. Weight files return all tensors in this
form, including float32, because a view of the bytes costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zimage_core.cpu.rotation import rotate
from zimage_core.errors import BadShape
from zimage_core.formats import BlockFormat
from zimage_core.quant.dequantize import dense_rows


@dataclass
class PlaneCache:
    """What a GPU derives from one weight: its planes, made when a product first needs them, and small things.

    Args:
        planes: `kernels.planar.Planes`; None if there are none (yet).
        closed: Whether no planes will be made any more: memory was short, or the weight's memory is reused
            for other weights, so that planes would become wrong.
        words: View of the packed bytes that the kernels read.
        paths: The path that `quant.gpu` chose, by all that the choice depends on.
    """

    planes: Any = None
    closed: bool = False
    words: Tensor | None = None
    paths: dict[tuple[Any, ...], str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """Rows of packed blocks and their logical shape.

    Args:
        packed: uint8 [..., row bytes], with the leading axes of `shape`; usually a view of a mapped file.
        format: Block format of the bytes.
        shape: Logical shape, whose last axis counts weights; () is one number.
        scale: Factor of the dequantised weights (fp8, NVFP4), float32: one number, or one for each
            index of axis 0.
        rotation: Block of the Hadamard rotation that the rows were multiplied by before they were quantised;
            0 for none. See `cpu.rotation`.
        planes: Cache of the planes that a GPU derives from these bytes.

    Raises:
        BadShape: The bytes are not uint8 or do not fit format and shape, or the scale fits neither form.
    """

    packed: Tensor
    format: BlockFormat
    shape: tuple[int, ...]
    scale: Tensor | None = None
    planes: PlaneCache = field(default_factory=PlaneCache, repr=False)
    rotation: int = 0

    def __post_init__(self) -> None:
        shape = self.shape or (1,)
        wanted = (*shape[:-1], self.format.row_bytes(shape[-1]))
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != wanted:
            raise BadShape(
                f"{self.format.name} weights of shape {self.shape} are uint8 of shape {wanted} when packed, "
                f"not {self.packed.dtype} of shape {tuple(self.packed.shape)}"
            )
        if self.scale is None:
            return
        if self.scale.dtype != torch.float32 or (self.scale.numel() != 1 and self.scale.shape != shape[:1]):
            raise BadShape(
                f"the scale of {self.format.name} weights of shape {self.shape} must be float32, one number "
                f"or one a row, not {self.scale.dtype} of shape {tuple(self.scale.shape)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self.packed.numel()

    @property
    def device(self) -> torch.device:
        """The device of the bytes."""
        return self.packed.device

    def rows(self, start: int, stop: int) -> QuantTensor:
        """Indices start..stop of axis 0, with their part of a per-row scale; nothing is copied."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise BadShape(f"rows {start} to {stop} do not lie in a tensor of shape {self.shape}")
        scale = self.scale
        if scale is not None and scale.numel() != 1:
            scale = scale[start:stop]
        return self.like(self.packed[start:stop], shape=(stop - start, *self.shape[1:]), scale=scale)

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same bytes on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return self.like(self.packed.to(device), scale=scale)

    def like(self, packed: Tensor, **others: Any) -> QuantTensor:
        """Other bytes of the same kind, with other fields where they are given; planes are its own."""
        return replace(self, packed=packed, planes=PlaneCache(), **others)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weights [*shape].

        For plain numbers already in `dtype` and without scale, the result is a view of the same bytes, so do
        not write to it.
        """
        dense = dense_rows(self.packed, self.format, dtype if self.scale is None else torch.float32)
        if self.scale is not None:
            dense = (dense * per_row(self.scale, dense.ndim)).to(dtype)
        if self.rotation:
            dense = rotate(dense.float(), self.rotation).to(dtype)
        return dense.view(self.shape)


def per_row(scale: Tensor, ndim: int) -> Tensor:
    """Reshape a scale (one number, or one for each index of axis 0) to multiply a tensor of `ndim` axes."""
    return scale.view(-1, *[1] * (ndim - 1))


def check_operands(shape: Sequence[int], weight: Tensor | QuantTensor) -> None:
    """Raise BadShape unless x of this shape can be multiplied by a matrix W^T."""
    if len(weight.shape) != 2 or tuple(shape[-1:]) != (weight.shape[-1],):
        raise BadShape(
            f"linear: x has shape {tuple(shape)} and the weight {tuple(weight.shape)}; "
            "the last axes of both must agree"
        )
