"""int8 rows in the order of torch's FBGEMM, which multiplies one row of float32 by them in one operation.

It rounds x to 8 bits between its least and its largest number and reads weights in the order in which they
lie in memory: 20 GB/s a thread where `torch._int_mm` reads 15 (AVX512, VNNI). torch means to remove these
operators; `capability.packed_int8_pays` then says no, and `torch._int_mm` serves.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

ENGINE = "fbgemm"


def pack(values: Tensor, scale: Tensor) -> Any:
    """int8 [N, K] and float32 [N] -> what `multiply` takes, of N * K bytes.

    Raises:
        RuntimeError, AttributeError: This torch has no FBGEMM.
    """
    engines = torch.backends.quantized
    before = engines.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantised tensors will be removed
        engines.engine = ENGINE
        try:
            zeros = torch.zeros(len(values), dtype=torch.int64)
            whole = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(whole, None)
        finally:
            engines.engine = before


def multiply(x: Tensor, packed: Any) -> Tensor:
    """x W^T for one row float32 [1, K] -> float32 [1, N]; NaN where x has one."""
    try:
        out: Tensor = torch.ops.quantized.linear_dynamic(x, packed, False)
    except RuntimeError:
        if not x.isnan().any():
            raise
        return x.new_full((1, packed.unpack()[0].shape[0]), float("nan"))
    return out
