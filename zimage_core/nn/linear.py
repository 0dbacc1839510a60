"""Linear and Embedding with a weight that may be dense or packed; the models need not know which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument, BadShape
from zimage_core.formats import DTYPE_NAMES
from zimage_core.nn.layers import has_hooks
from zimage_core.quant import int8, ops
from zimage_core.quant.arithmetic import EXACT
from zimage_core.quant.few_rows import MOST
from zimage_core.quant.int8 import Int8Rows
from zimage_core.quant.tensor import QuantTensor

Weight = nn.Parameter | QuantTensor
Product = Callable[["Tensor | Int8Rows"], Tensor]
Branch = Callable[[Product, "Tensor | Int8Rows"], Tensor]
"""(the layer's own product, x) -> the layer's result: what an adapter puts beside the weight."""


class _Weighted(nn.Module):
    """A module with one matrix `weight`: a Parameter if it is dense, a QuantTensor if it is packed.

    `.to` changes `dtype` as it would change that of a dense weight; packed bytes are moved, never converted.
    Assigning `weight` replaces it by one of either kind. A state dict holds the packed bytes as `packed`;
    format, scale and rotation are not in it and must be those of the module that loads it. A dense `weight`
    in a state dict replaces a packed one.
    """

    weight: Weight

    def __init__(self, rows: int, columns: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.dtype = self.weight.dtype
        self._shape = (rows, columns)
        nn.init.normal_(self.weight, std=std)

    def assign(self, quant: QuantTensor, dtype: torch.dtype | None = None) -> None:
        """Use a weight from a file, without copying it.

        Plain numbers of the wanted dtype become a dense Parameter (without gradient, a view of the
        file's map); anything else stays packed.

        Args:
            quant: The weight.
            dtype: Dtype of a dense weight and of an Embedding's result; None keeps the present one.

        Raises:
            BadShape: The shape is not this module's.
        """
        self.dtype = dtype or self.dtype
        plain = f"torch.{DTYPE_NAMES.get(quant.format.name)}" == str(self.dtype) and quant.scale is None
        self.set_weight(nn.Parameter(quant.dequantize(self.dtype), requires_grad=False) if plain else quant)

    def set_weight(self, weight: Weight) -> Weight:
        """Use another weight of the same shape, dense or packed, and return the previous one.

        Raises:
            BadShape: The shape is not this module's.
        """
        previous = self.weight
        self.weight = weight
        return previous

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "_shape" in self.__dict__:
            if not isinstance(value, (nn.Parameter, QuantTensor)):
                raise BadArgument(
                    f"weight: got {type(value).__name__}, wanted a torch.nn.Parameter or a QuantTensor"
                )
            if tuple(value.shape) != self._shape:
                raise BadShape(f"got a weight of shape {tuple(value.shape)}, this layer needs {self._shape}")
            # torch accepts a plain attribute only where no parameter of that name is registered
            self._parameters.pop("weight", None)
            self.__dict__.pop("weight", None)
        super().__setattr__(name, value)

    def dequantize_weight(self, dtype: torch.dtype) -> None:
        """Replace a packed weight by a dense one on the same device, which is faster but larger."""
        if isinstance(self.weight, QuantTensor):
            self.set_weight(nn.Parameter(self.weight.dequantize(dtype), requires_grad=False))
            self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight, dense or packed."""
        return self.weight.device

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, QuantTensor):
            destination[f"{prefix}packed"] = self.weight.packed

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own, key, dense = self.weight, f"{prefix}packed", f"{prefix}weight"
        if not isinstance(own, QuantTensor):
            if key in state_dict:
                error_msgs.append(f"{key} is packed, this layer's weight is dense; load a packed network")
            return
        found, plain = state_dict.get(key), state_dict.get(dense)
        if dense in unexpected_keys:
            unexpected_keys.remove(dense)
        if plain is not None:
            if tuple(plain.shape) != own.shape:
                error_msgs.append(f"{dense} has shape {tuple(plain.shape)}, this layer needs {own.shape}")
            else:
                value = plain.detach().to(own.device, self.dtype, copy=True)
                self.weight = nn.Parameter(value, requires_grad=False)
            return
        if found is None:
            missing_keys.append(key)
        elif found.shape != own.packed.shape or found.dtype != own.packed.dtype:
            error_msgs.append(
                f"{key} is {found.dtype} of shape {tuple(found.shape)}, this layer's {own.format.name} "
                f"weight is {own.packed.dtype} of shape {tuple(own.packed.shape)}"
            )
        else:
            self.weight = own.like(found.to(own.device, copy=True), scale=own.scale)
        if key in unexpected_keys:
            unexpected_keys.remove(key)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        weight = self.weight
        if isinstance(weight, QuantTensor):
            moved = fn(weight.packed)
            if moved is not weight.packed:
                scale = None if weight.scale is None else weight.scale.to(moved.device)
                self.weight = weight.like(moved, scale=scale)
        return self

    def _kind(self) -> str:
        return self.weight.format.name if isinstance(self.weight, QuantTensor) else str(self.weight.dtype)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and packed bytes of a module and all modules inside it."""
    yield from module.parameters()
    yield from module.buffers()
    for weight in packed_weights(module):
        yield weight.packed


def packed_weights(module: nn.Module) -> Iterator[QuantTensor]:
    """Packed weights of a module and all modules inside it."""
    for each in module.modules():
        if isinstance(each, _Weighted) and isinstance(each.weight, QuantTensor):
            yield each.weight


class Linear(_Weighted):
    """x [..., in_features] -> [..., out_features] in x's dtype, by the layer's arithmetic.

    `arithmetic` says in which numbers it multiplies; see `nn.compute`. `branch` is what adapters add to the
    product; it is no module and no part of a state dict. `few` multiplies a few rows by the weight, while a
    language model writes; see `nn.decoding`.
    """

    branch: Branch | None = None
    few: Callable[[Tensor], Tensor] | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(out_features, in_features, in_features**-0.5)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.arithmetic = EXACT

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        """x [..., in_features], or what `ready` made of it -> [..., out_features]."""
        return self.product(x) if self.branch is None else self.branch(self.product, x)

    def product(self, x: Tensor | Int8Rows) -> Tensor:
        """x times the layer's own weight, without what adapters add."""
        if self.few is not None and self.takes_few(x):
            out = self.few(x if isinstance(x, Tensor) else x.dequantize())
            return out if self.bias is None else out + self.bias.to(out.dtype)
        mode = self.arithmetic.mode
        if mode == "int8":
            return int8.linear(x, self.weight, self.bias, self.arithmetic.rotated)
        own = x if isinstance(x, Tensor) else x.dequantize()  # rows that were made for another layer
        return ops.linear(own, self.weight, self.bias, in_bfloat16=mode == "bfloat16")

    def takes_few(self, x: Tensor | Int8Rows) -> bool:
        """Whether `few` multiplies x."""
        return self.few is not None and 0 < math.prod(x.shape[:-1]) <= MOST and not torch.is_grad_enabled()

    @property
    def rotation(self) -> int | None:
        """Block of the rotation of x in int8, 0 for none; None where the layer takes x as it is."""
        own = type(self).forward is Linear.forward and "forward" not in vars(self)
        if self.arithmetic.mode != "int8" or not own or has_hooks(self) or torch.compiler.is_compiling():
            return None
        return int8.rotation_of(self.weight, self.arithmetic.rotated)

    def extra_repr(self) -> str:
        """Shape, format and arithmetic, for print(model)."""
        own = "" if self.arithmetic.mode == "exact" else f", {self.arithmetic.mode}"
        if own == ", int8" and (block := int8.rotation_of(self.weight, self.arithmetic.rotated)) > 1:
            own += f" rotated by {block}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._kind()}{own}"


def shared_rotation(*layers: nn.Module) -> int | None:
    """Block of the rotation with which all layers take int8 rows, 0 for none; None where one takes floats."""
    rotations = {getattr(layer, "rotation", None) for layer in layers}  # a layer may have been replaced
    return rotations.pop() if len(rotations) == 1 else None


def ready(x: Tensor | Int8Rows, *layers: Linear) -> Tensor:
    """x in the form that several layers share: quantised once where all of them multiply int8 alike.

    Args:
        x: [..., K], or an `Int8Rows` already.
        layers: Layers that read it.

    Returns:
        x, or an `Int8Rows`, which multiplies by a number and is taken by these layers as x is.
    """
    if isinstance(x, Int8Rows):
        return x  # type: ignore[return-value]
    # a layer may have been replaced by one that has no forms
    if any(getattr(layer, "few", None) is not None and layer.takes_few(x) for layer in layers):
        return x  # the forms share one product if they get the same x, and round it by themselves
    rotation = shared_rotation(*layers)
    return x if rotation is None else int8.quantize_rows(x, rotation)  # type: ignore[return-value]


def multiplies_int8(layer: nn.Module) -> bool:
    """Whether a layer multiplies int8; one that was put in its place does not."""
    return isinstance(layer, Linear) and layer.arithmetic.mode == "int8"


class Embedding(_Weighted):
    """ids [...] -> [..., dim]; only the requested rows of a packed table are read."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__(num, dim, 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., dim]."""
        return ops.embedding(ids, self.weight, self.dtype)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        return f"{self._shape[0]}, {self._shape[1]}, {self._kind()}"
