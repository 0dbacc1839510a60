"""Defends: on every path a packed weight multiplies, and is looked up, as its dequantised rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.helpers.blocks import every_format
from tests.helpers.linear import HALF, assert_product, dense, quant, random_x
from zimage_core.errors import BadShape, Unsupported
from zimage_core.kernels import planar
from zimage_core.nn.linear import Embedding
from zimage_core.quant import dispatch, gpu, ops
from zimage_core.quant.dequantize import dequantize
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.blocks import as_blocks
from zimage_core.reference.dequantize import dequantize as reference

# the interpreter computes in NumPy, which warns of overflow and NaN in masked elements
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("calls"),
]


@every_format
def test_every_format_multiplies_as_its_dequantised_rows(fmt, device, calls):
    """Three axes of x and a float32 bias; formats with planes are fused, plain numbers meet no kernel."""
    weight, x = quant(fmt.name, 24, 256, device), random_x(2, 3, 256, device=device)
    if fmt.is_integer:  # of deviation 16
        x = x / 16
    bias = random_x(24, device=device, dtype=torch.float32, seed=1)
    assert_product(ops.linear(x, weight, bias), x, weight, bias)
    path = "fused" if fmt.name in dispatch.PLANAR_BITS else "dequantise" if fmt.weights > 1 else None
    assert calls == ({"fused": 1, "repack": 1} if path == "fused" else {path: 1} if path else {})


@pytest.mark.parametrize("mode", ["fused", "dequantise"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_path_that_is_asked_for_is_taken(name, mode, bias, device, calls, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", mode)
    for dtype in (HALF, torch.bfloat16):
        weight, x = quant(name, 40, 256, device), random_x(5, 256, device=device, dtype=dtype)
        b = random_x(40, device=device, dtype=dtype, seed=1) if bias else None
        assert_product(ops.linear(x, weight, b), x, weight, b)
    assert calls == ({"fused": 2, "repack": 2} if mode == "fused" else {"dequantise": 2})


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "NVFP4", "F16", "BF16"])
def test_float32_is_multiplied_in_float32(name, device, calls):
    weight, x = quant(name, 24, 256, device), random_x(5, 256, device=device, dtype=torch.float32)
    assert_product(ops.linear(x, weight), x, weight)
    assert not calls["fused"], "torch's own product of float32 is faster"


def test_rows_of_x_decide_between_the_two(device, calls):
    """As `choose` says; planes come with the first x that wants them and stay for the next."""
    weight = quant("Q8_0", 8, 64, device)
    most = dispatch.crossover(weight.format, "sm_90")
    for rows, ran in (
        (most + 1, {"dequantise": 1}),
        (most, {"dequantise": 1, "repack": 1, "fused": 1}),
        (most + 1, {"dequantise": 2, "repack": 1, "fused": 1}),
        (1, {"dequantise": 2, "repack": 1, "fused": 2}),
    ):
        x = random_x(rows, 64, device=device)
        assert_product(ops.linear(x, weight), x, weight)
        assert calls == ran


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "NVFP4"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.3]), torch.rand(24) + 0.1])
def test_scales_beside_weights_multiply_their_rows(name, scale, device):
    weight, bias = quant(name, 24, 64, device, scale), random_x(24, device=device, seed=1)
    for dtype in (HALF, torch.bfloat16, torch.float32):
        x = random_x(2, 3, 64, device=device, dtype=dtype)
        assert_product(ops.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("scratch", [1 << 20, 16 * 256 * 2])
def test_a_scale_beside_blocks_is_no_case_for_the_fused_kernel(scratch, device, calls, monkeypatch):
    monkeypatch.setattr(gpu, "SCRATCH_BYTES", scratch)
    for scale in (torch.tensor(0.5), torch.rand(24) + 0.1):
        weight, x = quant("Q4_0", 24, 256, device, scale), random_x(2, 256, device=device, dtype=HALF)
        assert_product(ops.linear(x, weight), x, weight)
    assert not calls["fused"]


@pytest.mark.parametrize("mode", ["fused", "dequantise"])
def test_x_and_bias_may_lie_anyhow(mode, device, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", mode)
    weight = quant("Q4_K", 24, 256, device)
    x = random_x(3, 256, 4, device=device).transpose(1, 2)[:, 1::2]
    bias = random_x(48, device=device, seed=1)[::2]
    assert not x.is_contiguous()
    assert_product(ops.linear(x, weight, bias), x, weight, bias)
    one = random_x(256, device=device)
    assert_product(ops.linear(one, weight, bias), one, weight, bias)


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "F8_E4M3"])
def test_nothing_times_something_is_nothing(name, device):
    weight = quant(name, 8, 256, device)
    assert ops.linear(random_x(2, 0, 256, device=device), weight).shape == (2, 0, 8)
    assert ops.linear(random_x(2, 3, 256, device=device), weight.rows(3, 3)).shape == (2, 3, 0)


def test_plain_numbers_may_start_at_an_odd_address(device):
    weight = quant("F16", 8, 64, device)
    buffer = torch.zeros(weight.nbytes + 1, dtype=torch.uint8, device=device)
    buffer[1:] = weight.packed.view(-1)
    odd = QuantTensor(buffer[1:].view(8, -1), weight.format, weight.shape)
    x = random_x(3, 64, device=device)
    assert torch.equal(ops.linear(x, odd), ops.linear(x, weight))


def whole_numbers(name: str, rows: int, width: int, device: torch.device) -> QuantTensor:
    """Weights that are integers, so that sums with integers of x are exact in any order."""
    weight = quant(name, rows, width, torch.device("cpu"))
    blocks = as_blocks(weight.packed.numpy(), weight.format)
    for field in weight.format.fields:
        if field.code == "f2":
            blocks[field.name] = 1
    return weight.to(device)


@pytest.mark.parametrize("bias", [False, True])
def test_slabs_give_the_bits_of_the_whole(bias, device, calls, monkeypatch):
    """44 rows in slabs of 16: the last has 12."""
    monkeypatch.setattr(dispatch, "MODE", "dequantise")
    weight = whole_numbers("Q4_K", 44, 256, device)
    x = random_x(5, 256, device=device).mul(2).round().float()
    b = random_x(44, device=device, seed=1).mul(8).round().float() if bias else None
    whole = ops.linear(x, weight, b)
    monkeypatch.setattr(gpu, "SCRATCH_BYTES", 16 * 256 * 4 + 100)
    assert torch.equal(ops.linear(x, weight, b), whole)
    assert calls["dequantise"] == 1 + 3
    monkeypatch.setattr(gpu, "SCRATCH_BYTES", 1)  # eight rows at least
    assert torch.equal(ops.linear(x, weight, b), whole)
    assert calls["dequantise"] == 1 + 3 + 6


def test_fused_is_refused_where_it_cannot_be_had(device, calls, monkeypatch):
    """Each time, not only the first."""
    monkeypatch.setattr(dispatch, "MODE", "fused")
    x = random_x(3, 256, device=device)
    cases = [
        (x, quant("IQ2_XXS", 8, 256, device), "IQ2_XXS has no planar layout"),
        (random_x(3, 96, device=device), quant("Q4_0", 8, 96, device), "rows of 96 weights"),
        (x.float(), quant("Q4_K", 8, 256, device), "float32"),
    ]
    for x, weight, says in cases * 2:
        with pytest.raises(Unsupported, match=f"{says}.*use auto"):
            ops.linear(x, weight)
    monkeypatch.setattr(gpu, "_room_for_planes", lambda device: 10)
    weight = quant("Q4_K", 8, 256, device)
    for _ in range(2):
        with pytest.raises(Unsupported, match="need 1184 bytes and 10 are free"):
            ops.linear(cases[0][0], weight)
    assert not calls


@pytest.mark.parametrize(("kernels", "dtype"), [("on", torch.float64), ("off", HALF)])
def test_float64_and_kernels_off_take_the_torch_path(kernels, dtype, device, calls, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", "off")
    weight, x = quant("Q4_K", 8, 256, device), random_x(3, 256, device=device, dtype=dtype)
    wanted = functional.linear(x.float(), weight.dequantize()).to(dtype)
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    got = ops.linear(x, weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert not calls
    assert weight.planes.planes is None


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_gradients_through_packed_weights_are_refused(name, device, calls):
    weight, x = quant(name, 8, 256, device), random_x(3, 256, device=device)
    with pytest.raises(Unsupported, match="no gradients"):
        ops.linear(x.requires_grad_(), weight)
    assert not calls
    bias = random_x(8, device=device).requires_grad_()  # as a layer's parameter has
    y = ops.linear(x.detach(), weight, bias)
    assert not y.requires_grad


@every_format
def test_dequantize_is_the_reference(fmt, device, calls):
    """Rows in two axes; blocks go through the kernel, and bits agree in float32."""
    weight = quant(fmt.name, 6, 256, device)
    stacked = QuantTensor(weight.packed.view(2, 3, -1), fmt, (2, 3, 256))
    wanted = torch.from_numpy(reference(weight.packed.cpu().numpy(), fmt))
    for got in (stacked.dequantize(), dequantize(stacked.packed, fmt.name)):
        assert got.shape == (2, 3, 256)
        assert torch.equal(got.cpu().view(6, 256), wanted)
    assert calls == ({"dequantise": 2} if fmt.weights > 1 else {})


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_knows_every_float_type_and_a_scale(dtype, device):
    for name, scale in (("Q4_K", None), ("F8_E4M3", torch.rand(4) + 0.5), ("F8_E5M2", torch.tensor(2.0))):
        weight = quant(name, 4, 256, device, scale)
        got = weight.dequantize(dtype)
        assert got.dtype == dtype
        step = {HALF: 2.0**-10, torch.bfloat16: 2.0**-7}.get(dtype, 2.0**-23)
        torch.testing.assert_close(got.cpu().double(), dense(weight), rtol=step, atol=2.0**-24)


def test_rows_that_are_not_whole_blocks_are_refused(device, calls):
    with pytest.raises(BadShape, match="Q4_K"):
        dequantize(torch.zeros(2, 145, dtype=torch.uint8, device=device), "Q4_K")
    assert not calls


@pytest.mark.parametrize("name", ["Q6_K", "IQ3_S", "F16", "F8_E4M3"])
def test_an_embedding_reads_the_rows_asked_for(name, device, calls):
    scale = torch.rand(9) + 0.1 if name == "F8_E4M3" else None
    table, weight = Embedding(9, 256), quant(name, 9, 256, device, scale)
    table.assign(weight, torch.bfloat16)
    ids = torch.tensor([[8, 8], [0, 3]])
    wanted = dense(weight)[ids]
    got = ops.embedding(ids, weight)
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=2.0**-23, atol=0)
    torch.testing.assert_close(table(ids).cpu().double(), wanted, rtol=2.0**-7, atol=0)
    assert ops.embedding(ids[:0], weight).shape == (0, 2, 256)
    assert not calls["repack"]
    assert weight.planes.planes is None, "a table is never multiplied from planes here"


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_the_operator_that_dequantises_is_one_for_torch(name, device):
    packed = quant(name, 4, 256, device).packed
    for dtype in (HALF, torch.float32):
        torch.library.opcheck(torch.ops.zimage.dequantize.default, (packed, name, dtype))


@pytest.mark.parametrize("case", ["fused", "dequantised", "scaled"])
def test_the_operator_that_multiplies_is_one_for_torch(case, device):
    name = "F8_E4M3" if case == "scaled" else "Q4_0"
    weight, x = quant(name, 8, 64, device), random_x(2, 3, 64, device=device)
    scale = torch.tensor(0.5, device=device) if case == "scaled" else None
    planes = list(planar.repack(weight.packed, weight.format)) if case == "fused" else []
    bias = None if case == "dequantised" else random_x(8, device=device, seed=1)
    arguments = (x, weight.packed, name, scale, bias, planes)
    torch.library.opcheck(torch.ops.zimage.linear.default, arguments)
    weight = QuantTensor(weight.packed, weight.format, weight.shape, scale)
    assert_product(torch.ops.zimage.linear(*arguments), x, weight, bias)
