"""Attention against the float64 oracle, and through torch's fused kernel."""

from __future__ import annotations

import pytest
import torch

from zimage_core.nn.attention import attention
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
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)  # sums of 16 and of 9 float32 products


@pytest.mark.parametrize("lead", [(), (2,)])
def test_no_matrix_of_scores_is_built(lead):
    """Without a leading axis torch would take its unfused way, at 1024 px a matrix of 2 GB a block."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        attention(*qkv(lead))
    names = {event.key for event in seen.key_averages()}
    assert any("flash" in name for name in names), names
    assert not any("attention_math" in name for name in names)
