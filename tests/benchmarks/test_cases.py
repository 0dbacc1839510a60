"""The timed shapes are those of the networks, and add up to their known sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import cases
from zimage_core.models import block_norms, transformer
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


def test_the_parts_of_a_step_are_the_calls_of_the_network(monkeypatch):
    """Counted with their shapes in one call of `ZImageTransformer.step`."""
    config = replace(
        cases.TRANSFORMER, dim=64, n_layers=3, n_refiner_layers=2, n_heads=2, cap_feat_dim=32, hidden_dim=96,
        axes_dims=(8, 12, 12),
    )  # fmt: skip
    model = ZImageTransformer(config).eval()
    called = Counter()
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(
                lambda m, args: called.update([("linear", m.out_features, m.in_features, len(args[0]))])
            )
    for name in cases.STREAMS:
        monkeypatch.setattr(*counting(block_norms, name, called))
    monkeypatch.setattr(*counting(transformer, "attention", called))
    with torch.no_grad():
        prepared = model.prepare([torch.randn(5, 32)], [0.5], (8, 12))
        called.clear()
        model.step(torch.randn(config.in_channels, 8, 12), prepared, 0)
    rows = {"layers": 64, "noise_refiner": 32}
    monkeypatch.setattr(cases, "image_rows", lambda pixels, config: 32)
    wanted = Counter()
    for case in cases.step_linears(64, 5, config):
        # the last layer leaves pads out, the first has none yet
        m = 24 if case.name in ("x_embedder", "final.linear") else case.m
        wanted["linear", case.n, case.k, m] += case.count
    for case in cases.step_elementwise(64, 5, config):
        wanted[case.name, case.rows] += case.count
    for case in cases.step_attention(64, 5, config):
        wanted["attention", case.length] += case.count
        assert case.length == rows[case.name]
    assert called == wanted


def counting(module, name: str, called: Counter):
    """What replaces a function and counts its calls with the rows of its first argument."""
    real = getattr(module, name)

    def counted(x, *arguments, **options):
        called[name, len(x)] += 1
        return real(x, *arguments, **options)

    return module, name, counted
