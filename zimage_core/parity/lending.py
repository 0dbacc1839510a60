"""Lends the weights of a loaded network to another one of the same names, a matrix at a time.

Two float32 copies of a network of 6 billion weights would not fit most machines. So the borrower is built
without memory, and each large matrix exists only during the call of the layer that has it. Packed weights are
decoded by `zimage_core.reference`, so that both sides multiply the same numbers and only arithmetic differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zimage_core.cpu.rotation import rotate
from zimage_core.errors import Unsupported
from zimage_core.nn.linear import Embedding
from zimage_core.parity.precision import in_float32
from zimage_core.quant.tensor import QuantTensor, per_row
from zimage_core.reference.dequantize import dequantize

KEPT = 1 << 15
"""Norms, biases and pad tokens, up to this many numbers, are assigned once."""
SLAB = 1 << 22
"""Weights that the reference decodes at a time."""


def numbers_of(weight: Tensor | QuantTensor) -> Tensor:
    """The numbers of a dense or packed weight as float32 (float64 if they are stored so)."""
    if isinstance(weight, Tensor):
        return weight.detach()
    rows = max(1, SLAB // max(weight.shape[-1], 1)) if weight.shape else 1
    packed = weight.packed.reshape(-1, weight.packed.shape[-1]).numpy()
    with in_float32():  # the reference's float32 is part of what a format means
        parts = [dequantize(packed[i : i + rows], weight.format) for i in range(0, len(packed), rows)]
        dense = torch.from_numpy(np.concatenate(parts)).view(weight.shape)
        if weight.scale is not None:
            dense = dense * per_row(weight.scale, dense.ndim)
        return rotate(dense, weight.rotation) if weight.rotation else dense


class Lender:
    """The weights of a loaded network.

    Args:
        network: A network as `weights.load` builds it; its weights may be packed.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def weight(self, name: str) -> Tensor | QuantTensor | None:
        """The parameter of that name, dense or packed; None if there is none."""
        owner, _, leaf = name.rpartition(".")
        try:
            found = getattr(self._network.get_submodule(owner), leaf, None)
        except AttributeError:
            return None
        return found if isinstance(found, (Tensor, QuantTensor)) else None

    def numbers(self, name: str, dtype: torch.dtype) -> Tensor:
        """The numbers of a parameter, in a dtype."""
        weight = self.weight(name)
        if weight is None:
            raise Unsupported(f"the checkpoint has no tensor for {name}")
        return numbers_of(weight).to(dtype)

    def rows(self, name: str, dtype: torch.dtype, ids: Tensor) -> Tensor:
        """Rows of a table, without the rest of it."""
        weight = self.weight(name)
        if isinstance(weight, QuantTensor):
            own = ids.reshape(-1)
            scale = weight.scale
            if scale is not None and scale.numel() != 1:
                scale = scale[own]
            part = weight.like(weight.packed[own], shape=(len(own), weight.shape[-1]), scale=scale)
            return numbers_of(part).to(dtype).view(*ids.shape, -1)
        return self.numbers(name, dtype)[ids]

    def largest(self) -> int:
        """Numbers in the largest matrix that a borrower gets, tables left out."""
        sizes = [0]
        for module in self._network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, (Tensor, QuantTensor)) and not isinstance(module, Embedding):
                sizes.append(int(np.prod(weight.shape)))
        return max(sizes)


def lend(borrower: nn.Module, lender: Lender, dtype: torch.dtype, who: str) -> None:
    """Give a network that was built on the meta device the weights of another.

    Args:
        borrower: The network; every parameter of it is assigned, or appears when its layer is called.
        lender: Where the numbers come from.
        dtype: Dtype of the numbers.
        who: Name of the borrower's program, for the message.

    Raises:
        Unsupported: The borrower has a parameter of another shape, or one that the checkpoint lacks.
    """
    for name, own in list(borrower.named_parameters()):
        place, _, leaf = name.rpartition(".")
        module = borrower.get_submodule(place)
        theirs = lender.weight(name)
        if theirs is None or tuple(theirs.shape) != tuple(own.shape):
            found = "no such tensor" if theirs is None else f"one of shape {tuple(theirs.shape)}"
            raise Unsupported(
                f"{who} builds {name} of shape {tuple(own.shape)}, the checkpoint has {found}; "
                f"it cannot run this network"
            )
        if own.numel() <= KEPT:
            setattr(module, leaf, _parameter(lender.numbers(name, dtype)))
            continue
        empty = _parameter(torch.zeros((), dtype=dtype).expand(own.shape))  # without memory, on the CPU
        setattr(module, leaf, empty)
        if isinstance(module, (nn.Embedding, Embedding)):
            module.forward = partial(lender.rows, name, dtype)  # type: ignore[method-assign]
        else:
            _lend_for_a_call(module, leaf, empty, partial(lender.numbers, name, dtype))


def _lend_for_a_call(
    module: nn.Module, leaf: str, empty: nn.Parameter, numbers: Callable[[], Tensor]
) -> None:
    """Let a parameter exist only while its module is called."""

    def give(module: nn.Module, _: Any) -> None:
        setattr(module, leaf, _parameter(numbers()))

    def take(module: nn.Module, _: Any, __: Any) -> None:
        setattr(module, leaf, empty)

    module.register_forward_pre_hook(give)
    module.register_forward_hook(take)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
