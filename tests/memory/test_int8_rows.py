"""int8 rows that are kept give the bits of those that a product makes, and go away without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.streamed import draw, ringed, streamed
from zimage_core.memory import int8_rows
from zimage_core.memory.attach import unstream
from zimage_core.memory.int8_rows import KeptRows, choose_layers, free_for_rows
from zimage_core.nn.compute import set_compute
from zimage_core.nn.linear import Linear
from zimage_core.quant import int8
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.load import load_transformer

GIB = 1 << 30


def opened(path):
    model = load_transformer(path)
    set_compute(model, "int8", torch.device("cpu"))
    return model


@pytest.fixture(scope="module")
def wanted_int8(dit_path):
    return draw(opened(dit_path))


@pytest.fixture
def model(dit_path):
    found = opened(dit_path)
    yield found
    unstream(found)


def weights(model):
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, Linear)}


def with_rows(model):
    return {name for name, weight in weights(model).items() if int8.is_int8(weight)}


@pytest.fixture
def counted(monkeypatch):
    """Weights that were quantised to be kept."""
    made, real = [], int8.quantize_weight

    def quantize_weight(weight, rotation):
        made.append(weight)
        return real(weight, rotation)

    monkeypatch.setattr(int8_rows.int8, "quantize_weight", quantize_weight)
    return made


def test_kept_rows_change_no_bit_and_are_made_once(model, wanted_int8, counted):
    rows, before = KeptRows(), weights(model)
    for _ in range(2):
        with rows.bound(model, GIB, mapped=True):
            assert len(with_rows(model)) == 7 * 7
            assert not any("refiner" in name and "context" in name for name in with_rows(model))
            assert torch.equal(draw(model), wanted_int8)
        assert weights(model) == before, "between two runs layers have their own weights"
    assert len(counted) == 7 * 7
    assert rows.nbytes == sum(w.shape[0] * (w.shape[1] + 4) for w in counted)
    rows.drop()
    assert rows.nbytes == 0


def test_a_weight_that_was_replaced_or_written_to_has_new_rows(model, counted):
    layer, rows = model.layers[0].attention.to_v, KeptRows()
    layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    with rows.bound(model, GIB, mapped=False):
        first = layer.weight
    layer.weight.data.mul_(-2)
    with rows.bound(model, GIB, mapped=False):
        assert torch.equal(layer.weight.scale, 2 * first.scale)
    own = nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)
    layer.weight = own
    with rows.bound(model, GIB, mapped=False):
        assert not layer.weight.packed.any()
        layer.weight = mine = nn.Parameter(torch.ones(own.shape), requires_grad=False)
    assert layer.weight is mine, "a callback's weight stays"
    assert len(counted) == 7 * 7 + 2


def test_another_network_gets_rows_of_its_own(model, dit_path, counted):
    rows = KeptRows()
    with rows.bound(model, GIB, mapped=True):
        pass
    other = opened(dit_path)
    with rows.bound(other, GIB, mapped=True):
        assert len(with_rows(other)) == 7 * 7
    assert not with_rows(model)


def test_without_memory_for_rows_products_make_their_own(model, wanted_int8, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(int8_rows.int8, "quantize_weight", full)
    rows = KeptRows()
    for _ in range(2):
        with rows.bound(model, GIB, mapped=False):
            assert not with_rows(model)
            assert torch.equal(draw(model), wanted_int8)


def test_layers_whose_rows_cost_most_come_first(model):
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear) and "layers." in n]
    layers = [(name, layer) for name, layer in layers if layer.arithmetic.mode == "int8"]
    nbytes = {name: layer.in_features * layer.out_features + 4 * layer.out_features for name, layer in layers}
    rotated = {name for name in nbytes if name.endswith(("to_out.0", "w2"))}
    room = sum(nbytes[name] for name in rotated)
    assert set(choose_layers(layers, room, mapped=False)) == rotated
    half = set(choose_layers(layers, room // 2, mapped=False))
    assert sum(nbytes[name] for name in half & rotated) > 0.8 * (room // 2)
    assert choose_layers(layers, room, mapped=False, some=False) == []
    more = set(choose_layers(layers, room, mapped=True)) - rotated
    assert more, "packed pages that nothing reads any more make room"
    assert choose_layers(layers, -1, mapped=False) == []


def test_what_is_free_leaves_files_activations_and_a_margin(model, monkeypatch):
    monkeypatch.setattr(int8_rows.page_cache, "available", lambda: 10 * GIB)
    file = model.opened.file
    size = sum(info.nbytes for info in file.tensors.values())
    room, mapped = free_for_rows([model, nn.Linear(2, 2)], torch.device("cpu"), 1000)
    assert (room, mapped) == (10 * GIB - size - 1000 - int8_rows.MARGIN, True)
    monkeypatch.setattr(int8_rows.page_cache, "available", lambda: None)
    assert free_for_rows([model], torch.device("cpu"), 0)[0] < 0, "where nobody knows, nothing is kept"


@pytest.mark.parametrize("options", [{}, ringed()], ids=["cpu", "ring"])
@pytest.mark.parametrize("resident", [(0, 2, 3), tuple(range(7))])
def test_kept_and_streamed_blocks_mix(model, wanted_int8, options, resident):
    before = weights(model)
    streamed(model, resident, int8_rows=resident[1:], **options)
    kept = {
        name for i in resident[1:] for name, m in model.blocks[i].named_modules() if isinstance(m, Linear)
    }
    assert len(with_rows(model)) == 7 * len(resident[1:])
    assert len(kept) >= 7
    for _ in range(2):
        assert torch.equal(draw(model), wanted_int8)
    assert len(with_rows(model)) == 7 * len(resident[1:])
    unstream(model)
    assert all(now is before[name] for name, now in weights(model).items())


def test_rows_lie_in_one_piece_of_a_devices_memory(model):
    stream = streamed(model, (0, 1), int8_rows=(0, 1), **ringed())
    rows = [weights(model)[name] for name in with_rows(model)]
    pieces = {w.packed.untyped_storage().data_ptr() for w in rows}
    assert pieces == {w.scale.untyped_storage().data_ptr() for w in rows}
    assert len(pieces) == 1
    assert stream.rest.device_bytes > sum(w.nbytes for w in rows)


def test_an_edit_of_kept_rows_is_seen_and_stays(model):
    stream = streamed(model, (0,), int8_rows=(0,))
    layer = model.layers[0] if model.blocks[0] is model.layers[0] else model.blocks[0]
    linear = next(m for m in layer.modules() if isinstance(m, Linear) and int8.is_int8(m.weight))
    linear.weight = mine = nn.Parameter(torch.zeros(linear.weight.shape), requires_grad=False)
    assert stream.edited()
    unstream(model)
    assert linear.weight is mine


def test_int8_rows_of_a_file_are_used_as_they_are():
    layer = Linear(64, 32)
    rows = int8.quantize_weight(torch.randn(32, 64))
    assert int8_rows.rows_of(layer, rows) is rows
    assert isinstance(rows, QuantTensor)
