"""Attention against the float64 oracle, through a fused kernel or in chunks, and torch's settings for it."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from zimage_core.nn import attention as module
from zimage_core.nn.attention import attention, attention_backends, settings
from zimage_core.quant.dispatch import ARCHITECTURES
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


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 9, 100])
def test_chunks_of_queries_are_the_formula(kv_heads, causal, rows, monkeypatch):
    """Chunks of one query, of four with a rest of one, of exactly all, of more than there are."""
    q, k, v = (x.double() for x in qkv((3,), kv_heads=kv_heads))
    mask = layers.causal_mask(9) if causal else None
    want = torch.from_numpy(layers.attention(q.numpy(), k.numpy(), v.numpy(), mask))
    monkeypatch.setattr(module, "SCORES", rows * 4 * 3 * 4 * 9)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    got = module._in_chunks(q, *module._repeated(q, k, v), causal).transpose(-3, -2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("architecture", "use", "dtype", "width", "best"),
    [
        ("sm_90", "transformer", "bfloat16", 128, "cudnn"),
        ("sm_90", "text encoder", "bfloat16", 128, "flash"),
        ("sm_100", "transformer", "float16", 128, "cudnn"),
        ("sm_86", "transformer", "bfloat16", 128, "cudnn"),
        ("sm_89", "transformer", "bfloat16", 128, "cudnn"),
        ("sm_87", "transformer", "bfloat16", 128, "cudnn"),
        ("sm_121", "transformer", "bfloat16", 128, "cudnn"),
        ("sm_80", "transformer", "bfloat16", 128, "flash"),
        ("sm_90", "transformer", "bfloat16", 256, "flash"),
        ("sm_75", "transformer", "float16", 128, "efficient"),
        ("sm_75", "text encoder", "float16", 128, "efficient"),
        ("sm_61", "transformer", "float16", 128, "efficient"),
        ("sm_75", "transformer", "bfloat16", 128, None),
        ("sm_90", "VAE", "float32", 512, "efficient"),
        ("sm_75", "VAE", "float32", 512, "efficient"),
        ("sm_90", "transformer", "float32", 128, "efficient"),
        ("sm_103", "transformer", "bfloat16", 128, "cudnn"),
        ("gfx942", "transformer", "bfloat16", 128, "flash"),
    ],
)
def test_the_backend_is_right_for_the_card_and_the_use(architecture, use, dtype, width, best):
    found = attention_backends(architecture, use, dtype, width)
    assert (found[0] if found else None) == best


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_backend_is_asked_for_twice_and_none_but_fused_ones(architecture):
    for use in ("transformer", "text encoder", "VAE"):
        found = attention_backends(architecture, use)
        assert len(set(found)) == len(found)
        assert set(found) <= {"cudnn", "flash", "efficient"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    return torch.device("cuda", 0)


def state():
    products = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    every = [*names, *(f"{name}_split_k" for name in names)]
    return [getattr(products, name, None) for name in every], _cur_sdpa_kernel_backends(with_priority=True)


@pytest.mark.parametrize("split", [True, False])
def test_settings_are_asked_for_and_the_users_own_come_back(gpu, split):
    products = torch.backends.cuda.matmul
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        products.allow_bf16_reduced_precision_reduction = (split, split)  # torch refuses (True, False)
        before = state()
        with settings(gpu, "transformer", torch.bfloat16):
            assert not products.allow_fp16_reduced_precision_reduction
            assert not products.allow_bf16_reduced_precision_reduction
            assert products.allow_bf16_reduced_precision_reduction_split_k == split
            order = state()[1]
            assert order[0] == SDPBackend.CUDNN_ATTENTION
            assert SDPBackend.FLASH_ATTENTION not in order, "the user switched it off"
        assert state() == before
        with pytest.raises(KeyError), settings(gpu, "text encoder", torch.bfloat16):
            raise KeyError
        assert state() == before
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        products.allow_bf16_reduced_precision_reduction = True


def test_threads_that_overlap_leave_the_users_settings(gpu):
    """The first to enter leaves first; what it saved must not be what the second one set."""
    before, both, left = state(), Barrier(2), Barrier(2)
    inside = []

    def first():
        with settings(gpu, "transformer", torch.bfloat16):
            both.wait(10)
        left.wait(10)

    def second():
        with settings(gpu, "VAE", torch.float32):
            both.wait(10)
            left.wait(10)
            inside.append(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)

    threads = [Thread(target=each) for each in (first, second)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert inside == [False]
    assert state() == before


def test_on_a_cpu_nothing_is_set():
    before = state()
    with settings(torch.device("cpu"), "transformer", torch.float32):
        assert state() == before
