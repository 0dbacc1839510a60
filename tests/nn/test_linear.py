"""Defends: a layer behaves alike with a dense and a packed weight, and casts leave packed bytes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zimage_core.errors import BadShape
from zimage_core.formats import FORMATS
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.encode import random_blocks


def quant(name: str, rows: int, width: int) -> QuantTensor:
    packed = random_blocks(FORMATS[name], (rows, width), np.random.default_rng(1))
    return QuantTensor(torch.from_numpy(packed), FORMATS[name], (rows, width))


@pytest.mark.parametrize("bias", [True, False])
def test_random_layer_is_torchs_linear(bias):
    layer, x = Linear(32, 7, bias=bias), torch.randn(2, 3, 32)
    if bias:
        torch.nn.init.normal_(layer.bias)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert sorted(layer.state_dict()) == (["bias", "weight"] if bias else ["weight"])


def test_state_dict_goes_both_ways_with_torch():
    theirs, ours = torch.nn.Linear(32, 7), Linear(32, 7, bias=True)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(ours(x), theirs(x))
    table = Embedding(7, 32)
    table.load_state_dict(torch.nn.Embedding(7, 32).state_dict())


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16", "IQ1_M"])
def test_packed_layer_is_the_layer_of_its_dequantised_weight(name):
    weight, x = quant(name, 40, 256), torch.randn(5, 256)
    layer, dense = Linear(256, 40, bias=True), Linear(256, 40, bias=True)
    torch.nn.init.normal_(layer.bias)
    layer.assign(weight)
    dense.load_state_dict({"weight": weight.dequantize(), "bias": layer.bias})
    assert layer.weight is weight
    assert layer.weight.packed.data_ptr() == weight.packed.data_ptr()
    with torch.no_grad():
        # the same products, summed in another order: K eps of the sum of magnitudes
        room = 258 * 2.0**-24 * (x.abs() @ weight.dequantize().abs().T) + 1e-6
        assert ((layer(x) - dense(x)).abs() <= room).all()
    assert layer.weight.format.name == name


def test_float32_of_the_file_becomes_the_dense_weight_without_a_copy():
    values = torch.randn(7, 32)
    layer = Linear(32, 7)
    layer.assign(QuantTensor(values.view(torch.uint8), FORMATS["F32"], (7, 32)))
    assert layer.weight.data_ptr() == values.data_ptr()
    assert not layer.weight.requires_grad
    assert not isinstance(layer.weight, QuantTensor)
    assert isinstance(layer.weight, torch.nn.Parameter)


@pytest.mark.parametrize(
    ("stored", "wanted", "is_dense"),
    [
        ("F32", torch.float32, True),
        ("F16", torch.float32, False),
        ("F16", torch.float16, True),
        ("BF16", torch.bfloat16, True),
        ("F32", torch.bfloat16, False),
        ("F8_E4M3", torch.float16, False),
    ],
)
def test_dense_exactly_when_the_file_has_the_wanted_dtype(stored, wanted, is_dense):
    layer = Linear(32, 7)
    layer.assign(quant(stored, 7, 32), wanted)
    assert isinstance(layer.weight, torch.nn.Parameter) == is_dense
    assert layer.dtype == wanted
    with torch.no_grad():
        assert layer(torch.randn(2, 32).to(wanted)).dtype == wanted


def test_a_state_dict_holds_the_packed_bytes():
    layer, other = Linear(256, 4), Linear(256, 4)
    layer.assign(quant("Q4_K", 4, 256))
    own = layer.weight.packed.flip(0)
    other.assign(QuantTensor(own.clone(), FORMATS["Q4_K"], (4, 256)))
    state = layer.state_dict()
    assert set(state) == {"packed"}
    with pytest.raises(RuntimeError, match=r"Missing key.*packed"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"packed is torch.uint8 of shape \(1, 144\), this layer's Q4_K"):
        other.load_state_dict({"packed": own[:1]})
    assert torch.equal(other.weight.packed, own)
    other.load_state_dict(state)
    assert torch.equal(other.weight.packed, layer.weight.packed)
    assert other.weight.packed.data_ptr() != layer.weight.packed.data_ptr()


def test_a_second_assign_replaces_the_first():
    layer = Linear(256, 4)
    layer.assign(quant("Q4_K", 4, 256))
    layer.assign(quant("F32", 4, 256))
    assert isinstance(layer.weight, torch.nn.Parameter)
    layer.assign(quant("Q6_K", 4, 256))
    assert isinstance(layer.weight, QuantTensor)
    assert layer.weight.format.name == "Q6_K"


@pytest.mark.parametrize(
    "make", [lambda: Linear(256, 4), lambda: Embedding(4, 256)], ids=["linear", "embedding"]
)
def test_wrong_shapes_are_named_before_they_are_run(make):
    with pytest.raises(BadShape, match=r"\(4, 512\).*\(4, 256\)"):
        make().assign(quant("Q4_K", 4, 512))


def test_casts_and_moves_leave_packed_bytes_and_scales_alone():
    scale = torch.rand(4) + 0.1
    weight = QuantTensor(quant("F8_E4M3", 4, 64).packed, FORMATS["F8_E4M3"], (4, 64), scale)
    layer = Linear(64, 4, bias=True)
    layer.assign(weight)
    layer.to(torch.bfloat16)
    assert layer.weight.packed.dtype == torch.uint8
    assert layer.bias.dtype == torch.bfloat16
    assert layer.dtype == torch.bfloat16
    assert torch.equal(layer.weight.scale, scale)
    layer.half().float()
    assert torch.equal(layer.weight.dequantize(), weight.dequantize())


def test_packed_bytes_are_moved_once():
    layer, moved = Linear(256, 4), []
    layer.assign(quant("Q4_K", 4, 256))
    layer._apply(lambda tensor: moved.append(tensor.clone()) or moved[-1])
    assert sum(tensor.dtype == torch.uint8 for tensor in moved) == 1
    assert layer.weight.packed is next(tensor for tensor in moved if tensor.dtype == torch.uint8)


def test_a_layer_built_without_memory_takes_its_weight_from_the_file():
    with torch.device("meta"):
        layer, table = Linear(256, 4), Embedding(4, 256)
    layer.assign(quant("Q4_K", 4, 256))
    table.assign(quant("F32", 4, 256))
    with torch.no_grad():
        assert layer(torch.randn(2, 256)).device.type == "cpu"
    assert table(torch.tensor([1])).device.type == "cpu"


def test_embedding_gives_rows_in_the_layers_dtype():
    weight = quant("Q6_K", 9, 256)
    table = Embedding(9, 256)
    table.assign(weight)
    ids = torch.tensor([[8, 8], [0, 3]])
    assert torch.equal(table(ids), weight.dequantize()[ids])
    table.half()
    assert table(ids).dtype == torch.float16
    dense = Embedding(9, 256)
    assert torch.equal(dense(ids), torch.nn.functional.embedding(ids, dense.weight))


def test_print_names_the_format():
    layer, table = Linear(256, 4), Embedding(4, 256)
    layer.assign(quant("Q4_K", 4, 256))
    assert "Q4_K" in repr(layer)
    assert "float32" in repr(table)
