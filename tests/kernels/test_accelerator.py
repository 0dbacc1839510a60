"""Defends: on every path a packed weight multiplies as its dequantised rows; planes are made once."""

from __future__ import annotations

import threading
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from tests.helpers.blocks import every_format
from zimage_core import accelerator, ops, paths
from zimage_core.errors import BadShape, Unsupported
from zimage_core.formats import FORMATS
from zimage_core.kernels import dequantize as dequantize_module
from zimage_core.kernels import matmul as matmul_module
from zimage_core.kernels import planar, tiles
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant_tensor import QuantTensor
from zimage_core.reference.blocks import as_blocks
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks

# the interpreter computes in NumPy, which warns of overflow and NaN in masked elements
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HALF = torch.float16


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The interpreter's tensors, or the GPU's; one session has only one of them."""
    if request.param == "cpu" and not tiles.interpreted():
        pytest.skip("kernels are compiled here")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> Counter[str]:
    """Kernels on, on a GPU that takes a path as an H100 does, no scratch yet; counts of what ran."""
    counts: Counter[str] = Counter()

    def counted(module: object, name: str, key: str) -> None:
        original = getattr(module, name)

        def wrapper(*args: object, **options: object) -> object:
            counts[key] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, wrapper)

    monkeypatch.setattr(paths, "KERNELS", "on")
    monkeypatch.setattr(paths, "MODE", "auto")
    monkeypatch.setattr(accelerator, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(accelerator, "_local", accelerator._Local())
    counted(matmul_module, "matmul", "fused")
    counted(dequantize_module, "dequantize", "dequantise")
    counted(planar, "repack", "repack")
    return counts


def quant(
    name: str, rows: int, width: int, device: torch.device, scale: torch.Tensor | None = None
) -> QuantTensor:
    packed = random_blocks(FORMATS[name], (rows, width), np.random.default_rng(rows + width))
    weight = QuantTensor(torch.from_numpy(packed), FORMATS[name], (rows, width), scale)
    return weight.to(device)


def random_x(*shape: int, device: torch.device, dtype: torch.dtype = HALF, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def dense(weight: QuantTensor) -> torch.Tensor:
    """float64 [N, K] by the NumPy reference."""
    w = torch.from_numpy(reference(weight.packed.cpu().numpy(), weight.format.name)).double()
    return w if weight.scale is None else w * weight.scale.cpu().double().view(-1, 1)


def assert_product(
    got: torch.Tensor, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None
) -> None:
    """Weights, bias and result rounded to x's dtype once each, and float32 sums of K + 2 terms.

    A rounding is half a unit in the last place, or a whole one where the interpreter truncates to bfloat16.
    """
    assert got.dtype == x.dtype
    assert got.shape == (*x.shape[:-1], weight.shape[0])
    x64, w = x.cpu().double(), dense(weight)
    exact, size = x64 @ w.T, x64.abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.cpu().double(), size + bias.cpu().double().abs()
    once = {torch.float32: 2.0**-24, HALF: 2.0**-11, torch.bfloat16: 2.0**-7}[x.dtype]
    sums = 2.0**-24 if x.device.type == "cpu" or x.dtype == torch.float32 else 2.0**-22
    room = (2.5 * once + (x.shape[-1] + 2) * sums) * size + 2.0**-24
    wrong = ~((got.cpu().double() - exact).abs() <= room)
    assert not wrong.any(), (
        f"{weight.format.name} {x.dtype}: {int(wrong.sum())} of {wrong.numel()} elements are off, "
        f"the first at {wrong.nonzero()[0].tolist()}"
    )


@every_format
def test_every_format_multiplies_as_its_dequantised_rows(fmt, device, calls):
    """Three axes of x and a float32 bias; formats with planes are fused, plain numbers meet no kernel."""
    weight, x = quant(fmt.name, 24, 256, device), random_x(2, 3, 256, device=device)
    if fmt.is_integer:  # of deviation 16
        x = x / 16
    bias = random_x(24, device=device, dtype=torch.float32, seed=1)
    assert_product(ops.linear(x, weight, bias), x, weight, bias)
    path = "fused" if fmt.name in paths.PLANAR_BITS else "dequantise" if fmt.weights > 1 else None
    assert calls == ({"fused": 1, "repack": 1} if path == "fused" else {path: 1} if path else {})


@pytest.mark.parametrize("mode", ["fused", "dequantise"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_path_that_is_asked_for_is_taken(name, mode, bias, device, calls, monkeypatch):
    monkeypatch.setattr(paths, "MODE", mode)
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
    most = paths.crossover(weight.format, "sm_90")
    for rows, ran in (
        (most + 1, {"dequantise": 1}),
        (most, {"dequantise": 1, "repack": 1, "fused": 1}),
        (most + 1, {"dequantise": 2, "repack": 1, "fused": 1}),
        (1, {"dequantise": 2, "repack": 1, "fused": 2}),
    ):
        x = random_x(rows, 64, device=device)
        assert_product(ops.linear(x, weight), x, weight)
        assert calls == ran


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.3]), torch.rand(24) + 0.1])
def test_scales_of_fp8_multiply_its_rows(name, scale, device):
    weight, bias = quant(name, 24, 64, device, scale), random_x(24, device=device, seed=1)
    for dtype in (HALF, torch.bfloat16, torch.float32):
        x = random_x(2, 3, 64, device=device, dtype=dtype)
        assert_product(ops.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("mode", ["fused", "dequantise"])
def test_x_and_bias_may_lie_anyhow(mode, device, monkeypatch):
    monkeypatch.setattr(paths, "MODE", mode)
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
    room = torch.zeros(weight.nbytes + 1, dtype=torch.uint8, device=device)
    room[1:] = weight.packed.view(-1)
    odd = QuantTensor(room[1:].view(8, -1), weight.format, weight.shape)
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
    monkeypatch.setattr(paths, "MODE", "dequantise")
    weight = whole_numbers("Q4_K", 44, 256, device)
    x = random_x(5, 256, device=device).mul(2).round().float()
    b = random_x(44, device=device, seed=1).mul(8).round().float() if bias else None
    whole = ops.linear(x, weight, b)
    monkeypatch.setattr(accelerator, "SCRATCH_BYTES", 16 * 256 * 4 + 100)
    assert torch.equal(ops.linear(x, weight, b), whole)
    assert calls["dequantise"] == 1 + 3
    monkeypatch.setattr(accelerator, "SCRATCH_BYTES", 1)  # eight rows at least
    assert torch.equal(ops.linear(x, weight, b), whole)
    assert calls["dequantise"] == 1 + 3 + 6


def test_scratch_is_one_buffer_that_grows(device, monkeypatch):
    monkeypatch.setattr(paths, "MODE", "dequantise")

    def after(rows: int) -> tuple[int, int]:
        x = random_x(3, 256, device=device)
        weight = quant("Q4_K", rows, 256, device)
        assert_product(ops.linear(x, weight), x, weight)
        (buffer,) = accelerator._local.scratch.values()
        return buffer.data_ptr(), buffer.numel()

    first = after(16)
    assert first[1] == 16 * 256 * 2
    assert after(16) == after(8) == first
    assert after(24)[1] == 24 * 256 * 2
    assert after(16)[1] == 24 * 256 * 2


def test_threads_do_not_share_scratch(device, monkeypatch):
    monkeypatch.setattr(paths, "MODE", "dequantise")
    weight, x = quant("Q4_0", 8, 64, device), random_x(3, 64, device=device)
    wanted, theirs = ops.linear(x, weight), []

    def other() -> None:
        theirs.extend([ops.linear(x, weight), *accelerator._local.scratch.values()])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    (mine,) = accelerator._local.scratch.values()
    assert torch.equal(theirs[0], wanted)
    assert theirs[1].data_ptr() != mine.data_ptr()


@pytest.mark.parametrize("mode", ["fused", "dequantise"])
def test_what_is_kept_from_inference_mode_serves_outside(mode, device, calls, monkeypatch):
    monkeypatch.setattr(paths, "MODE", mode)
    weight, x = quant("Q4_0", 8, 64, device), random_x(3, 64, device=device)
    with torch.inference_mode():
        inside = ops.linear(x, weight)
    assert torch.equal(ops.linear(x, weight), inside)
    assert calls["repack"] == (mode == "fused")
    kept = weight.cache["planes"] if mode == "fused" else accelerator._local.scratch.values()
    assert not any(tensor.is_inference() for tensor in kept)


def packed_layer(name: str, rows: int, width: int, device: torch.device, bias: bool = False) -> Linear:
    layer = Linear(width, rows, bias=bias).to(device)
    layer.assign(quant(name, rows, width, device))
    return layer


def test_planes_are_made_once_and_leave_with_the_bytes(device, calls):
    layer, x = packed_layer("Q4_K", 16, 256, device, bias=True), random_x(3, 256, device=device)
    y = layer(x)
    planes = layer.quant.cache["planes"]
    layer.to(torch.bfloat16)  # a cast is no move
    assert torch.equal(layer(x), y)
    assert layer.quant.cache["planes"] is planes
    assert calls == {"repack": 1, "fused": 2}
    gone = weakref.ref(planes.codes)
    del planes
    layer._apply(torch.clone)  # as a move to another device does
    assert gone() is None
    assert layer.quant.cache == {}
    assert torch.equal(layer(x), y)
    assert calls == {"repack": 2, "fused": 3}


def test_a_second_weight_does_not_meet_the_planes_of_the_first(device):
    layer, x = packed_layer("Q4_K", 16, 256, device), random_x(3, 256, device=device)
    layer(x)
    other = quant("Q5_K", 16, 256, device)
    layer.assign(other)
    assert_product(layer(x), x, other)


def test_without_room_for_planes_the_weight_is_dequantised(device, calls, monkeypatch):
    weight, x = quant("Q4_K", 16, 256, device), random_x(3, 256, device=device)
    need = planar.planar_bytes(weight.format, 16, 256)
    monkeypatch.setattr(accelerator, "_free_bytes", lambda device: need - 1)
    assert_product(ops.linear(x, weight), x, weight)
    assert calls == {"dequantise": 1}
    monkeypatch.setattr(accelerator, "_free_bytes", lambda device: pytest.fail("asked twice"))
    assert_product(ops.linear(x, weight), x, weight)
    assert calls == {"dequantise": 2}
    monkeypatch.setattr(accelerator, "_free_bytes", lambda device: need)
    weight = quant("Q4_K", 16, 256, device)
    assert_product(ops.linear(x, weight), x, weight)
    assert calls == {"dequantise": 2, "repack": 1, "fused": 1}


def test_fused_is_refused_where_it_cannot_be_had(device, calls, monkeypatch):
    """Each time, not only the first."""
    monkeypatch.setattr(paths, "MODE", "fused")
    x = random_x(3, 256, device=device)
    cases = [
        (x, quant("IQ2_XXS", 8, 256, device), "IQ2_XXS has no planar layout"),
        (random_x(3, 96, device=device), quant("Q4_0", 8, 96, device), "rows of 96 weights"),
        (x.float(), quant("Q4_K", 8, 256, device), "float32"),
    ]
    for x, weight, says in cases * 2:
        with pytest.raises(Unsupported, match=f"{says}.*use auto"):
            ops.linear(x, weight)
    monkeypatch.setattr(accelerator, "_free_bytes", lambda device: 10)
    weight = quant("Q4_K", 8, 256, device)
    for _ in range(2):
        with pytest.raises(Unsupported, match="need 1184 bytes and 10 are free"):
            ops.linear(cases[0][0], weight)
    assert not calls


@pytest.mark.parametrize(("kernels", "dtype"), [("on", torch.float64), ("off", HALF)])
def test_float64_and_kernels_off_take_the_torch_path(kernels, dtype, device, calls, monkeypatch):
    monkeypatch.setattr(paths, "KERNELS", "off")
    weight, x = quant("Q4_K", 8, 256, device), random_x(3, 256, device=device, dtype=dtype)
    wanted = functional.linear(x.float(), weight.dequantize()).to(dtype)
    monkeypatch.setattr(paths, "KERNELS", kernels)
    got = ops.linear(x, weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert not calls
    assert not weight.cache


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "F32", "F8_E4M3"])
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32])
def test_a_resident_weight_gives_the_numbers_of_the_dequantised_one(name, dtype, device, monkeypatch):
    monkeypatch.setattr(paths, "MODE", "dequantise")
    layer = Linear(256, 16, bias=True)
    scale = torch.rand(16) + 0.1 if name == "F8_E4M3" else None
    layer.assign(quant(name, 16, 256, device, scale), HALF)
    torch.nn.init.normal_(layer.bias)
    layer.to(device).to(dtype)
    x = random_x(2, 3, 256, device=device, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
        layer.make_resident(dtype)
        assert layer.packed is None
        assert layer.quant is None
        assert layer.weight.dtype == layer.dtype == dtype
        assert not layer.weight.requires_grad
        assert torch.equal(layer(x), y)
        layer.make_resident(HALF)  # of a dense layer: nothing is left to do
        assert layer.weight.dtype == dtype


def test_a_resident_weight_lets_the_packed_bytes_go(device):
    layer = packed_layer("Q4_K", 16, 256, device)
    layer(random_x(3, 256, device=device))
    kept = [weakref.ref(layer.packed), weakref.ref(layer.quant.cache["planes"].codes)]
    layer.make_resident(HALF)
    assert [ref() for ref in kept] == [None, None]


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
    for got in (stacked.dequantize(), ops.dequantize(stacked.packed, fmt.name)):
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
        ops.dequantize(torch.zeros(2, 145, dtype=torch.uint8, device=device), "Q4_K")
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
    assert not weight.cache, "a table is never multiplied from planes here"


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


class Two(torch.nn.Module):
    """Two layers and something for a compiler to do between them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.first = packed_layer("Q4_K", 64, 256, device, bias=True)
        self.second = packed_layer("Q8_0", 24, 64, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.silu(self.first(x)))


def test_a_module_compiles_whole_and_once(device, calls):
    """No break at a packed layer, no second graph for another number of rows, the numbers of eager mode."""
    model = Two(device)
    shapes = ((5, 256), (9, 256), (31, 256))
    with torch.no_grad():
        wanted = [model(random_x(*shape, device=device)) for shape in shapes]  # makes the planes
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        calls.clear()
        for shape, eager in zip(shapes, wanted, strict=True):
            assert torch.equal(compiled(random_x(*shape, device=device)), eager)
    assert counter.frame_count == 1
    assert calls == {"fused": 6}
    torch._dynamo.reset()


def test_a_compiled_module_without_planes_dequantises(device, calls):
    """A graph makes no planes: they are made by a run before it, or not at all."""
    model = Two(device)
    with torch.no_grad():
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        several = [random_x(rows, 256, device=device, dtype=torch.float32) for rows in (5, 3, 31)]
        got = [compiled(x) for x in several]
        assert calls == {"dequantise": 6}
        assert all(torch.equal(y, model(x)) for x, y in zip(several, got, strict=True))
    assert counter.frame_count == 1
    torch._dynamo.reset()
