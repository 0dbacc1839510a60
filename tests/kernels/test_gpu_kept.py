"""Defends: scratch, planes and dense weights are made once, leave with their weight, serve graphs."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from tests.helpers.linear import HALF, assert_product, packed_layer, quant, random_x
from zimage_core.nn.linear import Linear
from zimage_core.quant import dispatch, gpu, ops
from zimage_core.quant.tensor import QuantTensor

# the interpreter computes in NumPy, which warns of overflow and NaN in masked elements
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("calls"),
]


def test_scratch_is_one_buffer_that_grows(device, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "dequantise")

    def after(rows: int) -> tuple[int, int]:
        x = random_x(3, 256, device=device)
        weight = quant("Q4_K", rows, 256, device)
        assert_product(ops.linear(x, weight), x, weight)
        (scratch,) = gpu._local.scratch.values()
        return scratch.buffer.data_ptr(), scratch.buffer.numel()

    first = after(16)
    assert first[1] == 16 * 256 * 2
    assert after(16) == after(8) == first
    assert after(24)[1] == 24 * 256 * 2
    assert after(16)[1] == 24 * 256 * 2


def test_threads_do_not_share_scratch(device, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "dequantise")
    weight, x = quant("Q4_0", 8, 64, device), random_x(3, 64, device=device)
    wanted, theirs = ops.linear(x, weight), []

    def other() -> None:
        theirs.extend([ops.linear(x, weight), *(each.buffer for each in gpu._local.scratch.values())])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    (mine,) = gpu._local.scratch.values()
    assert torch.equal(theirs[0], wanted)
    assert theirs[1].data_ptr() != mine.buffer.data_ptr()


@pytest.mark.parametrize("mode", ["fused", "dequantise"])
def test_what_is_kept_from_inference_mode_serves_outside(mode, device, calls, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", mode)
    weight, x = quant("Q4_0", 8, 64, device), random_x(3, 64, device=device)
    with torch.inference_mode():
        inside = ops.linear(x, weight)
    assert torch.equal(ops.linear(x, weight), inside)
    assert calls["repack"] == (mode == "fused")
    if mode == "fused":
        kept = [*weight.planes.planes]
    else:
        (scratch,) = gpu._local.scratch.values()
        kept = [scratch.buffer, *scratch.views.values(), weight.planes.words]
    assert not any(tensor.is_inference() for tensor in kept)


def test_planes_are_made_once_and_leave_with_the_bytes(device, calls):
    layer, x = packed_layer("Q4_K", 16, 256, device, bias=True), random_x(3, 256, device=device)
    y = layer(x)
    planes = layer.weight.planes.planes
    layer.to(torch.bfloat16)  # a cast is no move
    assert torch.equal(layer(x), y)
    assert layer.weight.planes.planes is planes
    assert calls == {"repack": 1, "fused": 2}
    gone = weakref.ref(planes.codes)
    del planes
    layer._apply(torch.clone)  # as a move to another device does
    assert gone() is None
    assert layer.weight.planes.planes is None
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
    need = dispatch.planar_bytes(weight.format, 16, 256)
    monkeypatch.setattr(gpu, "_room_for_planes", lambda device: need - 1)
    assert_product(ops.linear(x, weight), x, weight)
    assert calls == {"dequantise": 1}
    monkeypatch.setattr(gpu, "_room_for_planes", lambda device: pytest.fail("asked twice"))
    assert_product(ops.linear(x, weight), x, weight)
    assert calls == {"dequantise": 2}
    monkeypatch.setattr(gpu, "_room_for_planes", lambda device: need)
    weight = quant("Q4_K", 16, 256, device)
    assert_product(ops.linear(x, weight), x, weight)
    assert calls == {"dequantise": 2, "repack": 1, "fused": 1}


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "F32", "F8_E4M3"])
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32])
def test_a_weight_dequantised_once_gives_the_numbers_of_each_product(name, dtype, device, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "dequantise")
    layer = Linear(256, 16, bias=True)
    scale = torch.rand(16) + 0.1 if name == "F8_E4M3" else None
    layer.assign(quant(name, 16, 256, device, scale), HALF)
    torch.nn.init.normal_(layer.bias)
    layer.to(device).to(dtype)
    x = random_x(2, 3, 256, device=device, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
        layer.dequantize_weight(dtype)
        assert not isinstance(layer.weight, QuantTensor)
        assert layer.weight.dtype == layer.dtype == dtype
        assert not layer.weight.requires_grad
        assert torch.equal(layer(x), y)
        layer.dequantize_weight(HALF)  # of a dense layer: nothing is left to do
        assert layer.weight.dtype == dtype


def test_a_weight_dequantised_once_lets_the_packed_bytes_go(device):
    layer = packed_layer("Q4_K", 16, 256, device)
    layer(random_x(3, 256, device=device))
    kept = [weakref.ref(layer.weight.packed), weakref.ref(layer.weight.planes.planes.codes)]
    layer.dequantize_weight(HALF)
    assert [ref() for ref in kept] == [None, None]


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
