"""Rows of int8 made straight from the codes of a format, and the exact product of int8."""

from __future__ import annotations

import pytest
import torch

from zimage_core.cpu import int8
from zimage_core.cpu.dequantize import dequantize_into
from zimage_core.cpu.rotation import rotate
from zimage_core.formats import FORMATS
from zimage_core.quantize.encode import encode

WIDTH, ROWS = 512, 24


def random_blocks(name: str) -> torch.Tensor:
    """Valid blocks with every code, scales of all signs and sizes included."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, WIDTH, generator=generator)
    packed = encode(w * torch.exp(torch.randn(ROWS, 1, generator=generator)), name)
    noise = torch.randint(0, 256, packed.shape, generator=generator, dtype=torch.uint8)
    fmt = FORMATS[name]
    keep = torch.zeros(fmt.nbytes, dtype=torch.bool)  # float16 scales stay, everything else is random
    first = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(name, 0)
    keep[first : first + (2 if name in ("Q3_K", "Q6_K", "Q4_0", "Q5_0", "Q8_0") else 4)] = True
    return torch.where(keep.repeat(WIDTH // fmt.weights), packed, noise)


@pytest.mark.parametrize("name", int8.CODES)
@pytest.mark.parametrize("rotation", [0, 256])
def test_rows_of_codes_are_the_weights_within_half_a_step(name, rotation):
    fmt, packed = FORMATS[name], random_blocks(name)
    dense = torch.empty(ROWS, WIDTH)
    dequantize_into(dense, packed, fmt)
    values, scale = torch.empty(ROWS, WIDTH, dtype=torch.int8), torch.empty(ROWS)
    int8.decode_into(values, scale, packed, fmt, rotation)
    wanted = rotate(dense, rotation)
    assert torch.isfinite(dense).all()
    error = (values.float() * scale[:, None] - wanted).abs() / scale[:, None]
    assert float(error.max()) <= 0.5 + 1e-3
    assert float(scale.min()) > 0


@pytest.mark.parametrize("name", int8.CODES)
def test_the_bound_of_a_row_is_near_its_largest_weight(name):
    fmt, w = FORMATS[name], torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    packed = encode(w, name)
    dense = torch.empty(64, 1024)
    dequantize_into(dense, packed, fmt)
    scale = torch.empty(64)
    int8.decode_into(torch.empty(64, 1024, dtype=torch.int8), scale, packed, fmt, 0)
    ratio = scale * 127 / dense.abs().amax(1)
    assert float(ratio.min()) > 1 - 1e-6
    assert float(ratio.mean()) < 1.15


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_exact_with_and_without_fast_instructions(monkeypatch, fast):
    if fast and not int8.int8_pays():
        pytest.skip("torch's product of int8 is slow or wrong on this CPU, and is not used")
    monkeypatch.setattr(int8, "int8_pays", lambda: fast)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (5, 3000), generator=generator, dtype=torch.int8)
    w = torch.randint(-127, 128, (7, 3000), generator=generator, dtype=torch.int8)
    x[0], w[0] = 127, -127  # the largest sums
    sums = torch.empty(5, 7, dtype=torch.int32)
    int8.multiply_into(sums, x, w)
    assert torch.equal(sums.long(), x.long() @ w.long().T)
