"""Defends: int8 products on a GPU have the reference's bits, by kernels and by torch, for all weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.linear import quant, random_x
from zimage_core.errors import Unsupported
from zimage_core.formats import FORMATS
from zimage_core.quant import dispatch, gpu, gpu_int8, int8
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference import int8 as reference

# the interpreter computes in NumPy, which warns of overflow and NaN in masked elements
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("calls"),
]


@pytest.fixture(params=["kernels", "torch"])
def way(request, monkeypatch) -> str:
    """Kernels, and plain torch as where none run."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "KERNELS", "off")
    return request.param


def numbers(weight: torch.Tensor | QuantTensor) -> np.ndarray:
    dense = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
    return dense.cpu().numpy()


def wanted(x: torch.Tensor, weight: np.ndarray, bias: torch.Tensor | None, group: int) -> torch.Tensor:
    xq, x_scale = reference.quantize_rows(x.reshape(-1, x.shape[-1]).float().cpu().numpy(), group)
    wq, w_scale = reference.quantize_rows(weight, group)
    add = None if bias is None else bias.cpu().numpy()
    y = torch.from_numpy(reference.product(xq, x_scale, wq, w_scale, add))
    return y.view(*x.shape[:-1], len(weight)).to(x.dtype)


def close(got: torch.Tensor, want: torch.Tensor, group: int) -> None:
    """Equal; rotated numbers halfway between two integers may be rounded to either."""
    if group:
        assert (got.cpu().float() - want.float()).norm() < 1e-3 * want.float().norm()
    else:
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ3_S", "F16", "F32"])
@pytest.mark.parametrize("group", [0, 256])
def test_packed_weights_are_quantised_for_the_product(name, group, way, device):
    weight, x = quant(name, 9, 256, device), random_x(2, 2, 256, device=device)
    bias = random_x(9, device=device, dtype=torch.float32, seed=1)
    close(gpu_int8.linear(x, weight, bias, group), wanted(x, numbers(weight), bias, group), group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_dense_weights_are_quantised_too(dtype, way, device):
    weight, x = (
        random_x(9, 64, device=device, dtype=dtype),
        random_x(5, 64, device=device, dtype=torch.float32),
    )
    close(gpu_int8.linear(x, weight, None), wanted(x, numbers(weight), None, 0), 0)


@pytest.mark.parametrize("one", [False, True])
def test_kept_rows_are_used_as_they_are(one, way, device):
    values, scale = gpu_int8.quantize_weight(random_x(24, 64, device=device, seed=3), 16)
    scale = scale[:1] if one else scale
    kept = QuantTensor(values.view(torch.uint8), FORMATS["I8"], (24, 64), scale, rotation=16)
    x = random_x(5, 64, device=device, dtype=torch.float32)
    xq, x_scale = (part.cpu().numpy() for part in gpu_int8.quantize_rows(x, 16))
    want = reference.product(xq, x_scale, values.cpu().numpy(), scale.expand(24).cpu().numpy())
    assert torch.equal(gpu_int8.linear(x, kept, None, 16).cpu(), torch.from_numpy(want))


def test_rows_of_x_are_quantised_once_for_several_products(way, device):
    x, weight = random_x(2, 3, 64, device=device), random_x(8, 64, device=device, seed=1)
    values, scale = gpu_int8.quantize_rows(x.view(6, 64), 0)
    rows = int8.Int8Rows(values, scale, (2, 3), x.dtype)
    assert torch.equal(gpu_int8.linear(rows, weight, None), gpu_int8.linear(x, weight, None))


@pytest.mark.parametrize("name", ["F8_E4M3", "NVFP4"])
def test_a_scale_beside_weights_joins_that_of_the_rows(name, way, device):
    for scale in (torch.tensor(0.5), torch.rand(24) + 0.1):
        weight, x = quant(name, 24, 64, device, scale), random_x(3, 64, device=device, dtype=torch.float32)
        plain = QuantTensor(weight.packed, weight.format, weight.shape)
        got = gpu_int8.linear(x, weight, None)
        torch.testing.assert_close(got, gpu_int8.linear(x, plain, None) * scale.to(device), rtol=1e-6, atol=0)


def test_slabs_give_the_bits_of_the_whole(way, device, monkeypatch):
    weight, x = quant("Q4_K", 40, 256, device), random_x(5, 256, device=device)
    bias = random_x(40, device=device, seed=1)
    whole = gpu_int8.linear(x, weight, bias, 0)
    monkeypatch.setattr(dispatch, "SCRATCH_BYTES", 16 * 256)
    assert torch.equal(gpu_int8.linear(x, weight, bias, 0), whole)
    assert gpu_int8.scratch_bytes(weight) == 16 * 256


@pytest.mark.parametrize("bias", [False, True])
def test_torch_multiplies_what_its_product_refuses(bias, way, device, monkeypatch):
    """Few rows, and sizes that are no multiple of eight, on a GPU; sums in several parts."""
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_75")
    monkeypatch.setattr(gpu_int8, "SUM_BYTES", 4 * 16 * 20)
    weight, x = random_x(13, 36, device=device), random_x(43, 36, device=device, dtype=torch.float32)
    real, seen = torch._int_mm, []

    def strict(a, b):
        assert a.shape[0] > 16
        assert not a.shape[1] % 8
        assert not b.shape[1] % 8
        seen.append(len(a))
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    add = random_x(13, device=device, dtype=torch.float32, seed=1) if bias else None
    close(gpu_int8.linear(x, weight, add), wanted(x, numbers(weight), add, 0), 0)
    assert len(seen) > 1


def test_a_card_without_int8_is_named(device, monkeypatch):
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_70")
    with pytest.raises(Unsupported, match="sm_70"):
        gpu_int8.linear(random_x(3, 64, device=device), random_x(8, 64, device=device), None)


def test_nothing_times_something_is_nothing(way, device):
    weight = quant("Q4_K", 8, 256, device)
    assert gpu_int8.linear(random_x(2, 0, 256, device=device), weight, None).shape == (2, 0, 8)
    assert gpu_int8.linear(random_x(2, 3, 256, device=device), weight.rows(3, 3), None).shape == (2, 3, 0)
