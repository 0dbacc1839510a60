"""A product from planes, and the bound within which it is that with the reference's weights.

The bound is elementwise. The kernel multiplies operands of x's dtype and adds K products and the bias in
float32, in an order of its own, so each term is rounded at most K + 2 times:

    |y - exact| <= g (|x| |W|^T + |bias|) + one rounding to x's dtype,    g = (K + 2) u / (1 - (K + 2) u)

with u = 2^-24. `exact` is float64 on the reference's weights, rounded to x's dtype as the kernel rounds them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels import tiles
from zimage_core.kernels.decode.table import DECODERS
from zimage_core.kernels.matmul import matmul
from zimage_core.kernels.planar import repack, step_weights
from zimage_core.kernels.tiles import Tile
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks

TAIL = 4096  # elements behind each result that no program may touch
FUSED = [FORMATS[name] for name, decoder in DECODERS.items() if decoder.bits]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_fused = pytest.mark.parametrize("fmt", FUSED, ids=lambda fmt: fmt.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
some_fused = pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
"""Two sides with one scale a run, two with a minimum, four with two scales a run."""


def unit_width(fmt: BlockFormat) -> int:
    """The shortest row that the kernel takes."""
    return max(fmt.weights, step_weights(DECODERS[fmt.name].bits))


def one_tile(device: torch.device, bm: int = 64, bn: int = 128, splits: int = 1) -> Tile:
    """Tall and wide in the interpreter, where a program costs what it costs; what fits on a GPU."""
    return (
        Tile(bm, bn, 4, 1, splits) if device.type == "cpu" else Tile(min(bm, 64), min(bn, 64), 4, 2, splits)
    )


def run(
    x: torch.Tensor,
    packed: np.ndarray,
    fmt: BlockFormat,
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The kernel's result on the CPU. What it allocates is full of NaN, with a tail that must stay so.

    `tile` takes the place of what the table says.
    """
    buffers: list[torch.Tensor] = []

    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffers.append(torch.full((math.prod(shape) + TAIL,), float("nan"), dtype=dtype, device=device))
        return buffers[-1][:-TAIL].view(shape)

    planes = repack(torch.from_numpy(packed).to(x.device), fmt)
    with pytest.MonkeyPatch.context() as patch:
        if tile:
            patch.setattr(tiles, "matmul", lambda *sizes: tile)
        patch.setattr(torch, "empty", poisoned)
        y = matmul(x, planes, fmt, len(packed), None if bias is None else bias.to(x.device))
    assert y.shape == (len(x), len(packed))
    assert y.dtype == x.dtype
    for buffer in buffers:
        assert buffer[-TAIL:].isnan().all(), f"{fmt.name}: something was written after the result"
    return y.cpu()


def operand(weights: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """float32 weights in float64, rounded to x's dtype as the kernel does: the interpreter truncates."""
    w = torch.from_numpy(weights)
    if dtype == torch.bfloat16 and device.type == "cpu":
        return (w.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    return w.to(dtype).double()


def check(
    got: torch.Tensor,
    x: torch.Tensor,
    packed: np.ndarray,
    fmt: BlockFormat,
    bias: torch.Tensor | None = None,
) -> None:
    """The bound at the head of this file, for every element."""
    device, dtype, width = x.device, x.dtype, x.shape[1]
    w, x, b = operand(reference(packed, fmt), dtype, device), x.cpu().double(), torch.zeros(len(packed))
    if bias is not None:
        b = bias.cpu()
    exact, size = x @ w.T + b.double(), x.abs() @ w.abs().T + b.double().abs()
    # tensor cores cut off where float32 rounds, two to four bits further right than a product of halves needs
    unit = 2.0**-22 if device.type == "cuda" and dtype != torch.float32 else 2.0**-24
    roundings = (width + 2) * unit
    # the last term: numbers below float32's normal ones, which a GPU and the interpreter's bfloat16 lack
    allowed = roundings / (1 - roundings) * size + 2.0**-126 * (width + x.abs().sum(1, keepdim=True))
    if dtype == torch.float16:
        allowed += 2.0**-11 * (exact.abs() + allowed) + 2.0**-25
    elif dtype == torch.bfloat16:
        allowed += (2.0**-8 if device.type == "cuda" else 2.0**-7) * (exact.abs() + allowed)
    wrong = ~((got.double() - exact).abs() <= allowed)
    if wrong.any():
        m, n = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{fmt.name} {dtype}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first in "
            f"row {m}, column {n}: got {got[m, n].item()!r}, "
            f"wanted {exact[m, n].item()!r} +- {allowed[m, n].item():.3g}"
        )


def random_x(rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(dtype).to(device)


def random_bias(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(99)).to(dtype)


def weights(fmt: BlockFormat, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """As a trained network has them; outputs of about 0.3 sqrt(width)."""
    return random_blocks(fmt, (rows, width), np.random.default_rng(seed), std=0.3)
