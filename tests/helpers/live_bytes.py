"""Bytes of tensors that are alive while code runs, on any device; the meta device costs no memory.

Counts storages, not tensors: a view adds nothing, and a storage counts until its last tensor is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_core.quant.int8 import Int8Rows
from zimage_core.weights.load import _Uninitialised


class LiveBytes(TorchDispatchMode):
    """Sums the storages made since it was entered.

    Args:
        without: Type of a device whose tensors are not counted.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at once.
    """

    def __init__(self, without: str = "") -> None:
        super().__init__()
        self.live = self.peak = 0
        self._without = without
        self._known: dict[int, int] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Arguments and weights: they were there before, and are not counted."""
        for tensor in tensors:
            self._see(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self._without:
                self._see(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _see(self, tensor: torch.Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = nbytes
        self.live += nbytes
        # the Python object of a storage lives as long as the storage where a tensor still holds it
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


@contextmanager
def as_the_kernels(monkeypatch: Any) -> Iterator[None]:
    """Products, attention and the element-wise steps of S3-DiT leave their result and nothing else behind."""
    from zimage_core.models import block_norms
    from zimage_core.nn import linear as linear_module

    def like(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def two(q: torch.Tensor, k: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return like(q), like(k)

    def product(x: Any, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)

    def rows(x: torch.Tensor, rotation: int) -> Int8Rows:
        values = torch.empty_like(x, dtype=torch.int8).flatten(0, -2)
        scale = torch.empty(len(values), device=x.device)
        return Int8Rows(values, scale, tuple(x.shape[:-1]), x.dtype, rotation)

    def int8_product(x: Any, weight: torch.Tensor, bias: Any, rotated: bool) -> torch.Tensor:
        return product(rows(x, 0) if isinstance(x, torch.Tensor) else x, weight)

    def mixture(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.empty_like(q)  # fused kernels keep the order of axes of q

    def no_call(*_: Any, **__: Any) -> Any:
        raise AssertionError("this path is not taken on the meta device")

    with monkeypatch.context() as patch:
        patch.setattr(block_norms, "rms_norm_modulate", like)
        patch.setattr(block_norms, "gate_norm_residual", like)
        patch.setattr(block_norms, "silu_gate", like)
        patch.setattr(block_norms, "rms_norm_modulate_int8", lambda x, *_: rows(x, 0))
        patch.setattr(block_norms, "silu_gate_int8", lambda gate, *_: rows(gate, 0))
        patch.setattr(block_norms, "qk_norm_rope", two)
        patch.setattr(linear_module, "ops", SimpleNamespace(linear=product, embedding=no_call))
        of_int8 = {"linear": int8_product, "quantize_rows": rows, "rotation_of": lambda *_: 0}
        patch.setattr(linear_module, "int8", SimpleNamespace(**of_int8))
        patch.setattr(nn.functional, "scaled_dot_product_attention", mixture)
        yield


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def on_meta(build: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A module of full size without memory, whose weights are not drawn."""
    with torch.device("meta"), _Uninitialised():
        module = build()
    return module.to(dtype).requires_grad_(False).eval()
