"""Encoders of plain floats: F32, F16, BF16, rounded to nearest even. Importance has no effect."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zimage_core.quantize.blocks import Encoder


def _number(dtype: torch.dtype, x: Tensor, importance: Tensor | None) -> Tensor:
    return x.to(dtype).contiguous().view(torch.uint8)


ENCODERS: dict[str, Encoder] = {
    "F32": partial(_number, torch.float32),
    "F16": partial(_number, torch.float16),
    "BF16": partial(_number, torch.bfloat16),
}
