"""Formats without blocks: floats, integers and the two fp8 types, one number a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.fields import f32, gather, words16
from zimage_core.cpu.tables import table
from zimage_core.cpu.workspace import Workspace
from zimage_core.formats import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()}
"""The torch dtype with the same bytes."""


def fp8_header(blocks: Tensor, work: Workspace) -> tuple[Tensor, ...]:
    """No header: fp8 blocks have no scale of their own."""
    return ()


def fp8_body(name: str, blocks: Tensor, out: Tensor, work: Workspace) -> None:
    """Convert two bytes per gather; torch's own conversion from E4M3 takes ten times as long."""
    raw, flat = blocks.view(-1), out.view(-1)
    even = len(raw) // 2 * 2
    if even:
        pairs = gather(name, words16(raw[:even].view(1, -1), work), f32, work)
        flat[:even].copy_(pairs.view(-1))
    if even < len(raw):
        flat[even:] = table(name, raw.device)[raw[even:].int()].view(f32)[:1]
