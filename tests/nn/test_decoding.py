"""Defends: a network that is ready for decoding uses the forms for few rows, and only inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.quant.test_few_rows import rows_of, weight_of
from zimage_core.cpu import int4
from zimage_core.formats import FORMATS
from zimage_core.nn.decoding import ReadyWeights, ready_for_decoding
from zimage_core.nn.linear import Embedding, Linear, ready
from zimage_core.quant import few_rows
from zimage_core.quant.arithmetic import Arithmetic
from zimage_core.quant.few_rows import MOST, form_of, prepare
from zimage_core.quant.int8 import Int8Rows

WIDTH = 256


@pytest.fixture(autouse=True)
def _nibbles_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "int4_pays", lambda: True)


def network() -> nn.Module:
    """A table that is also the head, a large layer with a bias, a layer of six bits and a dense one."""
    found = nn.Module()
    found.table, found.head = Embedding(96, WIDTH), Linear(WIDTH, 96)
    found.large, found.six, found.dense = Linear(WIDTH, 192, bias=True), Linear(WIDTH, 64), Linear(WIDTH, 32)
    found.table.assign(weight_of(FORMATS["Q4_K"], 1, 1, 96))
    found.head.set_weight(found.table.weight)
    found.large.assign(weight_of(FORMATS["Q4_K"], 1, 2, 192))
    nn.init.normal_(found.large.bias)
    found.six.assign(weight_of(FORMATS["Q6_K"], 1, 3, 64))
    return found.requires_grad_(False)


def block(v_format: str = "Q4_K") -> nn.Module:
    """Layers that read the same x, of which v may have another format."""
    found = nn.Module()
    for i, (name, rows) in enumerate({"q_proj": 128, "k_proj": 48, "v_proj": 80}.items()):
        layer = Linear(WIDTH, rows)
        layer.assign(weight_of(FORMATS[v_format if name == "v_proj" else "Q4_K"], 1, i, rows))
        found.add_module(name, layer)
    return found.requires_grad_(False)


LAYERS = ("head", "large", "six", "dense")


def results(net: nn.Module, count: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: net.get_submodule(name)(rows_of(count, WIDTH)) for name in LAYERS}


@pytest.mark.parametrize("mode", ["bfloat16", "exact"])
def test_few_rows_take_the_forms_and_nothing_else_does(mode: str) -> None:
    net = network()
    few, many = results(net, MOST), results(net, MOST + 1)
    with ready_for_decoding(net, mode) as ready:
        assert ready.skipped == 0
        assert ready.mode == mode
        for name, got in results(net, MOST).items():
            assert torch.equal(got, few[name]) == (name == "dense")
            torch.testing.assert_close(got, few[name], rtol=0, atol=0.02 * float(few[name].abs().max()))
        for name, got in results(net, MOST + 1).items():
            assert torch.equal(got, many[name])
    for name, got in results(net, MOST).items():
        assert torch.equal(got, few[name])


def test_the_budget_goes_to_the_smallest_forms_first() -> None:
    net = network()
    nbytes = {name: form_of(net.get_submodule(name).weight, "bfloat16").nbytes for name in LAYERS[:3]}
    with ready_for_decoding(net, "bfloat16", nbytes["large"] + nbytes["head"]) as ready:
        assert (net.head.few, net.large.few, net.six.few).count(None) == 1
        assert net.six.few is None
        assert ready.nbytes == nbytes["large"] + nbytes["head"]
        assert ready.skipped == 1
    with ready_for_decoding(net, "bfloat16", nbytes["large"] - 1) as ready:
        assert net.large.few is None
        assert net.head.few is not None
        assert ready.nbytes <= nbytes["large"] - 1
    with ready_for_decoding(net, "bfloat16", 0) as ready:
        assert ready.nbytes == 0
        assert ready.skipped == 3


def test_a_weight_that_was_replaced_is_not_used() -> None:
    net = network()
    ready = ReadyWeights(net, "bfloat16", 1 << 40)
    net.large.set_weight(weight_of(FORMATS["Q4_K"], 1, 9, 192))
    with ready.bound():
        assert net.large.few is None
        assert net.six.few is not None


def test_forms_are_left_behind_after_an_error() -> None:
    net = network()
    with pytest.raises(RuntimeError), ready_for_decoding(net):
        raise RuntimeError
    assert all(getattr(net, name).few is None for name in LAYERS)


def test_the_end_of_one_writer_takes_no_forms_from_another() -> None:
    net = network()
    first, second = (ReadyWeights(net, "bfloat16", 1 << 40).bound() for _ in range(2))
    first.__enter__()
    second.__enter__()
    mine = net.large.few
    first.__exit__(None, None, None)
    assert net.large.few is mine
    second.__exit__(None, None, None)
    assert net.large.few is None


def test_no_row_at_all_takes_the_usual_way() -> None:
    net = network()
    with ready_for_decoding(net, "exact"):
        assert all(got.shape[0] == 0 for got in results(net, 0).values())


def test_a_bias_and_a_branch_join_the_product() -> None:
    net = network()
    net.large.branch = lambda product, x: product(x) + 100
    wanted = results(net, 1)["large"]
    with ready_for_decoding(net, "exact"):
        got = results(net, 1)["large"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_gradients_take_the_usual_way() -> None:
    net = network()
    with ready_for_decoding(net), pytest.raises(Exception, match="packed weights give no gradients"):
        net.large(rows_of(1, WIDTH).requires_grad_())


NAMES = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def test_layers_that_multiply_int8_share_a_form_too() -> None:
    net = block()
    layers = [net.get_submodule(name) for name in NAMES]
    for layer in layers:
        layer.arithmetic = Arithmetic("int8", rotated=True)
    with ready_for_decoding(net, "exact"):
        x = rows_of(1, WIDTH)
        assert ready(x, *layers) is x
        assert isinstance(ready(rows_of(MOST + 1, WIDTH), *layers), Int8Rows)


@pytest.mark.parametrize("v_format", ["Q4_K", "Q6_K"])
@torch.no_grad()
def test_layers_that_read_the_same_x_are_multiplied_at_once(
    v_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, calls = block(v_format), []
    alone = [prepare(net.get_submodule(name).weight, "bfloat16") for name in NAMES]
    multiply = int4.multiply
    monkeypatch.setattr(int4, "multiply", lambda *args: calls.append(args) or multiply(*args))
    with ready_for_decoding(net, "bfloat16") as ready:
        assert ready.skipped == 0
        for seed in range(3):
            x = rows_of(1, WIDTH, seed)
            order = NAMES[seed:] + NAMES[:seed]
            found = {name: net.get_submodule(name)(x) for name in order}
            got = [found[name] for name in NAMES]
            assert len(calls) == (1 if v_format == "Q4_K" else 2)
            for own, few in zip(got, alone, strict=True):
                assert torch.equal(own, few(x))
            calls.clear()


@torch.no_grad()
def test_layers_called_in_another_order_or_with_another_x_get_their_own_products() -> None:
    net = block()
    alone = {name: prepare(net.get_submodule(name).weight, "bfloat16") for name in NAMES}
    with ready_for_decoding(net, "bfloat16"):
        for names in (("v_proj", "q_proj", "k_proj", "k_proj"), ("k_proj", "v_proj"), ("q_proj", "q_proj")):
            x = rows_of(2, WIDTH, len(names))
            for name in names:
                assert torch.equal(net.get_submodule(name)(x), alone[name](x))
            other = rows_of(1, WIDTH, 77)
            assert torch.equal(net.k_proj(other), alone["k_proj"](other))
        net.q_proj(x)
        x.mul_(2)
        net.q_proj(x)
        assert torch.equal(net.v_proj(x), alone["v_proj"](x))
