"""Parts of the benchmarks of compute modes whose faults would show as plausible figures."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cpu_products
from benchmarks.compute_modes import alone
from benchmarks.gain import gains
from zimage_core import ZImagePipeline
from zimage_core.formats import by_name
from zimage_core.nn.linear import Linear
from zimage_core.quant.arithmetic import EXACT
from zimage_core.quant.int8 import is_int8
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import encode


def small_weights() -> list[QuantTensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((40, 256),) * 4 + ((72, 256),) * 2 + ((40, 768),)
    q4 = by_name("Q4_0")
    rows = (torch.randn(n, k, generator=generator) * 0.02 for n, k in shapes)
    return [QuantTensor(encode(each, q4), q4, tuple(each.shape)) for each in rows]


def test_products_of_every_mode_are_those_of_the_weights():
    packed = small_weights()
    xs = [torch.randn(5, packed[group[0]].shape[1]) for group in cpu_products.INPUTS]
    inputs = [x for x, group in zip(xs, cpu_products.INPUTS, strict=True) for _ in group]
    wanted = [x @ weight.dequantize().t() for x, weight in zip(inputs, packed, strict=True)]
    kept = cpu_products.block(packed, "int8")
    cpu_products.keep_int8(kept)
    assert all(is_int8(layer.weight) for layer in kept)
    assert kept[3].weight.rotation == 256  # to_out rotates
    limits = {"exact": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}
    with torch.inference_mode():
        for mode, limit in limits.items():
            layers = cpu_products.block(packed, mode)
            for got, want in zip(cpu_products.by_layers(layers, xs)(), wanted, strict=True):
                assert (got - want).norm() / want.norm() < limit, mode
        for got, want in zip(
            cpu_products.by_layers(kept, xs)(), cpu_products.by_layers(layers, xs)(), strict=True
        ):
            assert torch.equal(got, want)


def test_the_gain_of_a_block_is_its_own():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    q = x * torch.tensor([[0.5], [0.8]])
    ones = torch.ones_like(x)
    assert gains(x, q, ones, whole=False).flatten().tolist() == pytest.approx([0.5, 0.8])
    assert gains(x, q, ones, whole=True).item() == pytest.approx((5 * 0.5 + 10 * 0.8) / 15)
    assert gains(x, q, torch.tensor([[1.0, 0.0]]).expand(2, 2), whole=True).item() == pytest.approx(0.77)
    assert gains(x, q * 0, ones, whole=False).tolist() == [[1.0], [1.0]]  # a block of zeros stays


def test_layers_alone_are_those_that_are_named():
    network = ZImagePipeline.from_default().transformer
    blocks = len(network.layers) + 2
    assert alone(network, ("w1", "w3"), rotated=True) == 2 * blocks
    chosen = {name for name, m in network.named_modules() if isinstance(m, Linear) and m.arithmetic != EXACT}
    assert len(chosen) == 2 * blocks
    assert all(name.endswith((".w1", ".w3")) for name in chosen)
    assert alone(network, ("final_layer.linear", "all_final_layer.2-1.linear"), rotated=False) == 1
