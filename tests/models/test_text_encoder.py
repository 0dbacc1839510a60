"""The text encoder alone: no last layer, float16 with a loud stream, refusals."""

import pytest
import torch

from tests.helpers.parity import WIDE, apart, in_float64
from zimage_core.config import TextEncoderConfig
from zimage_core.errors import BadArgument, BadShape
from zimage_core.models.text_encoder import TextEncoder

TINY = TextEncoderConfig(
    hidden_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=100,
)


def tiny():
    torch.manual_seed(0)
    model = TextEncoder(TINY)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model.eval()


def test_the_last_layer_and_the_final_norm_are_not_built():
    names = dict(tiny().named_parameters())
    assert len(tiny().layers) == 3
    assert "norm.weight" not in names


@torch.no_grad()
def test_float16_survives_a_branch_of_1e6_in_the_stream():
    loud = tiny()
    loud.layers[1].mlp.up_proj.weight *= 100
    loud.layers[1].mlp.down_proj.weight *= 3000
    ids = torch.arange(20)
    want = loud(ids)
    assert want.abs().max() > 65504
    got = loud.half()(ids)
    assert got.dtype == torch.float32
    # float16 keeps 11 bits; the sum over 96 products of such numbers keeps about 8
    assert (got - want).abs().max() <= 2**-8 * want.abs().max()


@torch.no_grad()
def test_a_token_does_not_see_later_ones():
    model, ids = tiny().double(), torch.arange(20)
    with in_float64():
        assert apart(model(ids[:7]), model(ids)[:7]) <= WIDE  # sums in another order


@pytest.mark.parametrize("ids", [torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)])
def test_ids_of_another_shape_are_refused(ids):
    with pytest.raises(BadShape, match=r"wanted \[L\]"):
        tiny()(ids)


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 1}, {"num_kv_heads": 3}, {"head_dim": 15}, {"arch": "gemma3"}, {"hidden_size": 0}],
)
def test_a_config_that_cannot_be_is_refused(change):
    from dataclasses import replace

    with pytest.raises(BadArgument, match="text encoder config"):
        replace(TINY, **change)
