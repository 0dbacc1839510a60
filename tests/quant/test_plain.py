"""Defends: weights unpacked without kernels, in large slabs, are the reference's and give its product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.blocks import assert_same_bits, every_format
from zimage_core.formats import FORMATS
from zimage_core.quant import dispatch, ops, plain
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks


def packed(name: str, rows: int, width: int) -> torch.Tensor:
    return torch.from_numpy(random_blocks(FORMATS[name], (rows, width), np.random.default_rng(rows)))


@every_format
@pytest.mark.parametrize("shift", [0, 3])
def test_slabs_of_any_alignment_are_the_reference(fmt, shift, monkeypatch):
    """19 rows in slabs of at most 8, once at an odd address."""
    if fmt.weights == 1:
        pytest.skip("plain numbers are converted by torch")
    width = 3 * fmt.weights
    monkeypatch.setattr(plain, "PLAIN_WEIGHTS", 8 * width)
    rows = packed(fmt.name, 19, width)
    memory = torch.zeros(rows.numel() + shift, dtype=torch.uint8)
    memory[shift:] = rows.view(-1)
    got = plain.dequantize(memory[shift:].view(19, -1), fmt, torch.float32)
    want = reference(rows.numpy(), fmt.name)
    assert_same_bits(got.numpy(), want, fmt)
    rounded = plain.dequantize(rows.view(1, 19, -1), fmt, torch.bfloat16)
    torch.testing.assert_close(
        rounded, torch.from_numpy(want).bfloat16()[None], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), ()])
def test_no_rows_and_empty_rows(shape):
    fmt = FORMATS["Q4_K"]
    rows = torch.zeros(*shape[:-1], (shape[-1:] or (2,))[0] * fmt.nbytes, dtype=torch.uint8)
    got = plain.dequantize(rows, fmt, torch.float16)
    assert got.shape == (*rows.shape[:-1], rows.shape[-1] // fmt.nbytes * 256)


@pytest.mark.parametrize("rows", [1, 8, 9, 37, 64])
@pytest.mark.parametrize("most", [1, 100, 640, 6400])
def test_slabs_cover_the_rows_once_and_are_of_equal_height(rows, most):
    found = plain.slabs(rows, 10, most)
    assert [row for first, last in found for row in range(first, last)] == list(range(rows))
    heights = [last - first for first, last in found]
    assert all(height <= max(8, most // 10) for height in heights)
    assert all(first % 8 == 0 for first, _ in found)
    assert len({*heights[:-1], heights[0]}) == 1
    assert len(found) <= -(-rows // max(8, most // 80 * 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_product_is_torchs_own_with_the_rounded_weight(dtype, name, scaled, monkeypatch):
    scale = torch.linspace(0.5, 2, 37) if scaled else None
    weight = QuantTensor(packed(name, 37, 256), FORMATS[name], (37, 256), scale)
    values = torch.from_numpy(reference(weight.packed.numpy(), name))
    dense = (values if scale is None else values * scale[:, None]).to(dtype)
    x, bias = torch.randn(2, 5, 256).to(dtype), torch.randn(37)
    want = torch.nn.functional.linear(x, dense, bias.to(dtype))
    # a slab of the product may take another routine of BLAS; results are sums of 256 terms
    size = torch.nn.functional.linear(x.double().abs(), dense.double().abs(), bias.double().abs())
    room = 258 * 2.0**-24 * size + 2 * torch.finfo(dtype).eps * want.double().abs()
    for most in (dispatch.SCRATCH_BYTES, 16 * 256 * dtype.itemsize):
        monkeypatch.setattr(ops, "SCRATCH_BYTES", most)
        monkeypatch.setattr(ops, "PLAIN_WEIGHTS", most // dtype.itemsize)
        got = ops.plain_linear(x, weight, bias)
        assert got.dtype == dtype
        assert ((got.double() - want.double()).abs() <= room).all()


def test_its_memory_is_bounded_by_scratch_and_slab():
    fmt = FORMATS["Q4_K"]
    square, tall = (dispatch.plain_bytes(fmt, rows, 3840) for rows in (3840, 10240))
    assert square == 3840 * 3840 * (2 + 4 + 3)
    assert tall == 10240 * 3840 * 2 + dispatch.PLAIN_WEIGHTS * 7
    most = dispatch.SCRATCH_BYTES + dispatch.PLAIN_WEIGHTS * 14
    assert all(dispatch.plain_bytes(each, 1 << 20, 3840) <= most for each in FORMATS.values())
    assert dispatch.plain_bytes(FORMATS["F16"], 100, 64, "float32") == 100 * 64 * 4
