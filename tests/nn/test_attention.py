"""Attention against the float64 oracle, and through torch's fused kernel."""

from __future__ import annotations

import pytest
import torch

from zimage_core.nn.layers import attention
from zimage_core.reference import layers


def qkv(lead, length=9, heads=4, kv_heads=4, dim=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, length, h, dim, generator=g) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("lead", [(), (1,), (3,)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_formula(lead, kv_heads, causal):
    q, k, v = qkv(lead, kv_heads=kv_heads)
    mask = layers.causal_mask(9) if causal else None
    want = torch.from_numpy(layers.attention(q.numpy(), k.numpy(), v.numpy(), mask)).flatten(-2)
    got = attention(q, k, v, causal)
    assert got.shape == (*lead, 9, 64)
    # A score is a sum of 16 products, at most |q| |k| / 4 in size. Its error moves a softmax by twice that,
    # relatively; 16 more roundings are for the exponential and the sums of 9.
    eps, largest = 2.0**-24, [float(x.norm(dim=-1).max()) for x in (q, k)]
    limit = (2 * 16 * largest[0] * largest[1] / 4 + 16) * eps * float(v.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=limit)
    exact = attention(q.double(), k.double(), v.double(), causal)
    want = layers.attention(*(x.double().numpy() for x in (q, k, v)), mask)
    torch.testing.assert_close(exact, torch.from_numpy(want).flatten(-2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_no_matrix_of_scores_is_built(lead):
    """Without a leading axis torch would take its unfused way, at 1024 px a matrix of 2 GB a block."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        attention(*qkv(lead))
    names = {event.key for event in seen.key_averages()}
    assert any("flash" in name for name in names), names
    assert not any("attention_math" in name for name in names)
