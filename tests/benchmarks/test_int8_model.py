"""The model of a step in int8 follows shapes and cards; its 16-bit side is that of `step_model`."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, int8_model, model, step_model
from benchmarks.report import read
from benchmarks.weights import blank, fill_int8, fill_packed, linears, relative_error
from zimage_core.config import TransformerConfig
from zimage_core.formats import FORMATS
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.quant.dispatch import ARCHITECTURES
from zimage_core.quant.int8 import is_int8


@pytest.mark.parametrize("card", int8_model.CARDS.values(), ids=lambda card: card.name)
def test_kept_rows_cost_no_more_than_packed_weights_and_no_less_than_their_operations(card):
    cost = int8_model.step(card)
    ops = sum(case.flops * case.count for case in cases.step_linears())
    fastest = ARCHITECTURES[card.architecture].int8_ops * card.tensor * int8_model.RATE.high
    assert ops / fastest < cost.linears.low < cost.kept.low < cost.packed.low
    assert 0 < cost.attention_share < 1


def test_the_16_bit_side_is_that_of_the_other_model():
    for card in step_model.GPUS.values():
        assert int8_model.step(card).sixteen == step_model.step(card).replayed()


def test_a_card_of_the_same_kind_scales_with_its_multiprocessors():
    large, small = (int8_model.step(int8_model.CARDS[name]) for name in ("RTX 4090", "RTX 4070 Ti S"))
    assert small.linears.middle / large.linears.middle == pytest.approx(128 * 2.52 / (66 * 2.61), rel=0.1)
    assert small.sixteen.middle / large.sixteen.middle == pytest.approx(1.8, rel=0.1)


def test_the_committed_figures_are_those_of_the_model():
    for name, sizes in read("model.json")["int8_ms"].items():
        for pixels, found in sizes.items():
            assert found == model.int8(int8_model.CARDS[name], int(pixels)), "python -m benchmarks.model"


@pytest.mark.parametrize("kept", [False, True])
@torch.no_grad()
def test_a_network_in_int8_has_the_weights_of_the_packed_one(kept):
    config = TransformerConfig(
        dim=64, n_heads=2, hidden_dim=96, axes_dims=(8, 12, 12), n_layers=2, cap_feat_dim=32
    )
    build, device = (lambda: ZImageTransformer(config)), torch.device("cpu")
    packed = fill_packed(blank(build, torch.float32, device), FORMATS["Q8_0"], torch.float32, device)
    found = fill_int8(blank(build, torch.float32, device), packed, device, kept)
    latent, words = torch.randn(config.in_channels, 1, 8, 8), torch.randn(5, 32)
    wanted, got = (net([latent], torch.tensor([0.5]), [words])[0] for net in (packed, found))
    assert 0 < relative_error(got, wanted) < 0.1
    assert any(is_int8(layer.weight) for _, layer in linears(found)) == kept
