"""Every kind of adapter gives W' x with W' computed apart in float64, for packed and dense weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import adapters
from zimage_core.adapters.applied import merged_weight
from zimage_core.adapters.change import Branch
from zimage_core.adapters.dialects import Target
from zimage_core.adapters.kinds import Scaling, change_of
from zimage_core.adapters.reading import scaling_of
from zimage_core.formats import FORMATS
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.encode import random_blocks
from zimage_core.weights.adapters import split_name

ROUNDING = 1e-5
"""Difference over the largest result: float32 sums of some hundred products, parts of which cancel."""


def layer_of(n, k, fmt, bias=False, seed=0):
    """A Linear with random weights, dense or in a block format."""
    layer = Linear(k, n, bias=bias)
    if fmt == "dense":
        layer.weight = nn.Parameter(adapters.random(n, k, seed=seed))
    else:
        packed = torch.from_numpy(random_blocks(fmt, (n, k), np.random.default_rng(seed), 0.1))
        layer.weight = QuantTensor(packed, FORMATS[fmt], (n, k))
    if bias:
        layer.bias = nn.Parameter(adapters.random(n, seed=seed + 9, scale=1.0))
    return layer.requires_grad_(False)


def leaves(tensors):
    """Tensors of a kind by the names that `split_name` gives them."""
    return {split_name(f"x.{name}")[1]: value for name, value in tensors.items()}


def change(kind, layer, seed=0, scaling=Scaling()):  # noqa: B008 - frozen
    tensors, delta = adapters.kind(kind, layer.out_features, layer.in_features, seed)
    return change_of("x", leaves(tensors), Target("transformer", "x"), layer, scaling), delta


def close(got, want):
    return float((got.double() - want).abs().max()) <= ROUNDING * float(want.abs().max())


SIZES = {
    "dense": [(20, 12), (12, 35), (35, 20)],
    "Q8_0": [(20, 64), (35, 32)],
    "Q4_K": [(12, 256)],
    "BF16": [(20, 12)],
}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_branches_add_up_to_the_weight_that_they_stand_for(data):
    fmt = data.draw(st.sampled_from(sorted(SIZES)))
    n, k = data.draw(st.sampled_from(SIZES[fmt]))
    layer = layer_of(n, k, fmt, bias=data.draw(st.booleans()))
    kinds = data.draw(st.lists(st.sampled_from(adapters.KINDS), min_size=1, max_size=3))
    weights = data.draw(
        st.lists(st.sampled_from([-0.5, 0.3, 1.0, 2.0]), min_size=len(kinds), max_size=len(kinds))
    )
    made = [change(kind, layer, seed=10 * i) for i, kind in enumerate(kinds)]
    changes = [(own, weight) for (own, _), weight in zip(made, weights, strict=True)]
    base = adapters.dense(layer)
    merged = base + sum(w * delta(base) for (_, delta), w in zip(made, weights, strict=True))
    x = adapters.random(2, 3, k, seed=99, scale=1.0)
    want = x.double() @ merged.T + (0 if layer.bias is None else layer.bias.double())
    assert close(Branch(layer, changes)(layer.product, x), want)
    assert close(merged_weight(layer, changes), merged)


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_the_least_work_is_done_for_each_kind(kind):
    layer = layer_of(20, 12, "dense")
    made = change(kind, layer)[0]
    dense = kind in ("loha dense", "diff", "set")
    assert (made.dense is not None) == dense
    assert (made.w1 is not None) == kind.startswith("lokr")


@pytest.mark.parametrize("kind", [kind for kind in adapters.KINDS if kind not in ("dora in", "oft out")])
def test_fused_q_k_and_v_are_cut(kind):
    n, k = 24, 12
    tensors, delta = adapters.kind(kind, 3 * n, k)
    layers = [layer_of(n, k, "dense", seed=i) for i in range(3)]
    whole = torch.cat([adapters.dense(layer) for layer in layers])
    merged = whole + delta(whole)
    for i, layer in enumerate(layers):
        target = Target("transformer", "x", (i * n, (i + 1) * n), 3 * n)
        own = change_of("x", leaves(tensors), target, layer, Scaling())
        x = adapters.random(4, k, seed=5)
        assert close(
            Branch(layer, [(own, 1.0)])(layer.product, x), x.double() @ merged[i * n : (i + 1) * n].T
        )


def test_the_cost_of_a_row_is_that_of_the_rank():
    layer = layer_of(64, 48, "dense")
    branch = Branch(layer, [(change("lora", layer)[0], 1.0), (change("lora", layer, seed=7)[0], 0.5)])
    assert branch.row_bytes() == 4 * 6
    assert branch.nbytes(torch.float32) >= 4 * 6 * (64 + 48)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 6}, 2.0),
        ({"transformer.lora_alpha": 6, "transformer.r": 3}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"x": 9}}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"attention.x": 9, "y": 1}}, 2.0),
    ],
)
def test_the_scale_is_that_of_pefts_configuration(config, scale):
    layer = layer_of(20, 12, "dense")
    made, delta = change("lora", layer, scaling=scaling_of(config, "file", {}))
    assert close(made.up @ made.down, scale * delta(None))


def test_an_alpha_in_the_file_precedes_the_configuration():
    layer = layer_of(20, 12, "dense")
    scaling = scaling_of({"lora_alpha": 60, "use_rslora": True}, "file", {})
    made, delta = change("lora alpha", layer, scaling=scaling)
    assert close(made.up @ made.down, delta(None))


def test_the_exact_cayley_transform_is_taken_where_peft_trained_with_it():
    layer = layer_of(20, 12, "dense")
    made, _ = change("oft in", layer, scaling=scaling_of({"use_cayley_neumann": False}, "file", {}))
    turn = made.turn_in + torch.eye(made.turn_in.shape[-1])
    assert torch.allclose(turn @ turn.transpose(1, 2), torch.eye(turn.shape[-1]).expand_as(turn), atol=1e-6)


def test_the_norm_of_lycoris_oft_is_limited_by_alpha():
    layer = layer_of(20, 12, "dense")
    tensors, _ = adapters.kind("oft out", 20, 12)
    tensors["alpha"] = torch.tensor(0.001)
    own = change_of("x", leaves(tensors), Target("transformer", "x"), layer, Scaling())
    blocks = tensors["oft_blocks"].double()
    skew = blocks - blocks.transpose(1, 2)
    skew *= 0.001 * 20 / skew.norm()
    assert close(own.turn_out + torch.eye(own.turn_out.shape[-1]), adapters.cayley(skew))
