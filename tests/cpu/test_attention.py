"""Attention with q k^T in int8 on a CPU against its reference and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from zimage_core.cpu import attention as int8_attention
from zimage_core.nn import attention as attention_module
from zimage_core.nn.attention import attention
from zimage_core.reference import attention_int8 as reference


def drawn(*shape, outlier=0.0):
    """q, k, v with heads of unit-norm q and k times sqrt(D), k with a large channel in common."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    q, k = (functional.normalize(each, dim=-1) * shape[-1] ** 0.5 for each in (q, k))
    k[..., 3] += outlier
    return q, k, v


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("tokens", [1, 37, 256, 300])
def test_it_computes_what_the_reference_says(tokens):
    """The weights of v are rounded to bfloat16, 2^-9 each, and so is the sum."""
    q, k, v = drawn(2, tokens, 64)
    wanted = torch.from_numpy(reference.attention(q.numpy(), k.numpy(), v.numpy()))
    assert relative(int8_attention.attention(q, k, v), wanted) < 2.0**-8


def test_smoothing_keeps_it_near_float64_where_a_channel_stands_out():
    q, k, v = drawn(2, 200, 64, outlier=30.0)
    exact = functional.scaled_dot_product_attention(*(each.double() for each in (q, k, v)))
    assert relative(int8_attention.attention(q, k, v), exact) < 0.015
    rough = reference.attention(q.numpy(), k.numpy(), v.numpy(), smooth=False)
    assert relative(torch.from_numpy(rough), exact) > 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_and_dtype_are_those_of_the_usual_attention(monkeypatch, dtype):
    monkeypatch.setattr(int8_attention, "pays", lambda tokens: True)
    q, k, v = (each.transpose(0, 1).contiguous().to(dtype) for each in drawn(3, 70, 32))
    usual, fast = attention(q, k, v), attention(q, k, v, in_int8=True)
    assert fast.shape == usual.shape
    assert fast.dtype == dtype
    assert 1e-4 < relative(fast, usual) < 0.02


def test_it_is_taken_for_long_sequences_without_mask_only(monkeypatch):
    monkeypatch.setattr(int8_attention, "int8_pays", lambda: True)
    monkeypatch.setattr(int8_attention, "bfloat16_pays", lambda: True)
    called = []
    monkeypatch.setattr(attention_module.int8_on_cpu, "attention", lambda q, k, v: called.append(1) or q)
    x, short = torch.randn(600, 2, 32), torch.randn(100, 2, 32)
    attention(x, x, x, in_int8=True)
    attention(x, x, x)
    attention(x, x, x, causal=True, in_int8=True)
    attention(short, short, short, in_int8=True)
    assert called == [1]


def test_what_is_not_finite_stays_so():
    q, k, v = drawn(1, 40, 32)
    k[0, 3, 2] = np.nan
    assert not torch.isfinite(int8_attention.attention(q, k, v)).all()
