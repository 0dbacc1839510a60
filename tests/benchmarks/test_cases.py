"""The timed shapes are those of the networks, and add up to their known sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import cases
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Linear


def test_a_step_at_1024_pixels_is_six_billion_weights_and_55_tflop():
    assert sum(case.weights for case in cases.block_linears()) == pytest.approx(6.016e9, rel=1e-3)
    assert cases.teraflops(cases.block_linears()) == pytest.approx(46.75, abs=0.01)
    assert cases.teraflops(cases.attention()) == pytest.approx(8.37, abs=0.01)
    assert cases.stages(1024, 256)[0] == ("layers", 4352, cases.TRANSFORMER.n_layers)


def sizes(model) -> list[tuple[int, int]]:
    found = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, Linear)]
    return sorted(found)


def test_the_cases_are_the_matrices_of_the_networks():
    config = replace(cases.TRANSFORMER, n_layers=3, n_refiner_layers=1)
    text = replace(cases.ENCODER, num_layers=3)
    with torch.device("meta"):
        model, layer = ZImageTransformer(config), TextEncoder(text).layers[0]
    listed = [*cases.block_linears(config=config), *cases.small_linears(config=config)]
    assert sorted((c.n, c.k) for c in listed for _ in range(c.count)) == sizes(model)
    listed = cases.encoder_linears(config=text)
    assert sorted((c.n, c.k) for c in listed for _ in range(c.count // 2)) == sizes(layer)


def test_named_shapes_begin_with_the_largest_of_a_block():
    assert next(iter(cases.shapes().items())) == ("w13", (10240, 3840))
    assert {"qkvo", "w2", "encoder.down", "adaLN"} <= set(cases.shapes())
