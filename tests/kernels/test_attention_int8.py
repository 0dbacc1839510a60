"""Defends: attention by int8 is its reference, and near exact attention where keys share large channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zimage_core.kernels import attention_int8 as kernels
from zimage_core.kernels import tiles
from zimage_core.nn import attention as module
from zimage_core.quant import dispatch, gpu
from zimage_core.reference import attention_int8 as reference
from zimage_core.reference.int8 import quantize_rows

# NumPy, the arithmetic of the interpreter, warns of planted NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

ROUNDED = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""Largest relative error of rounding to a dtype; the interpreter truncates to bfloat16."""


def drawn(
    length: int, device: torch.device, size: int = 128, heads: int = 2, sequences: int = 1,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> list[torch.Tensor]:  # fmt: skip
    """q, k and v [sequences, length, heads, size] as the slices of one projection."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(sequences, length, 3, heads, size, generator=generator).to(dtype)
    return list(both.to(device).unbind(2))


def per_head(x: torch.Tensor) -> np.ndarray:
    """[B, L, H, D] -> [B, H, L, D] float32."""
    return x.float().transpose(1, 2).cpu().numpy()


def joined(x: np.ndarray) -> np.ndarray:
    """[B, H, L, D] -> [B, L, H * D]."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    return reference.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5) @ v


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Each number within what rounding may do.

    A weight of softmax and the result are rounded once each to the dtype of v. The rest is float32: a score
    and its power, relatively 2^-17 for the largest scores here. An integer of k is the next one where the
    mean, summed in another order, decides a half: some in a million, which hardly move a score.
    """
    heads = [per_head(x) for x in (q, k, v)]
    want = reference.attention(*heads)
    spread = reference.attention(*heads[:2], np.abs(heads[2]))
    limit = (2 * ROUNDED[v.dtype] + 2.0**-10) * joined(spread)
    got = kernels.attention(q, k, v)
    assert got.dtype == v.dtype
    assert got.is_contiguous()
    assert (np.abs(got.float().cpu().numpy() - joined(want)) <= limit).all()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_any_length_is_the_reference(length, device):
    check(*drawn(length, device))


@pytest.mark.parametrize("size", kernels.HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_head_is_the_reference(size, dtype, device):
    check(*drawn(37, device, size, heads=3, sequences=2, dtype=dtype))


def test_scores_far_apart_and_strides_of_any_kind(device):
    """The running maximum rises by hundreds between blocks of keys; q, k and v lie differently."""
    q, k, v = drawn(150, device)
    k = k * torch.linspace(0.1, 30, 150, device=device)[:, None, None]
    apart = v.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.stack((q, q), -1)[..., 0]
    check(odd, k.half(), apart)


def test_rows_have_the_bits_of_the_reference(device):
    q, k, _ = drawn(150, device, sequences=2)
    rows = kernels.quantize(q, k)
    values, scale = quantize_rows(per_head(q))
    assert np.array_equal(rows.q.cpu().numpy().reshape(values.shape), values)
    factor = np.float32(128**-0.5 * np.log2(np.e))
    np.testing.assert_array_equal(rows.q_scale.cpu().numpy().reshape(scale.shape), scale * factor)
    wide, members = per_head(k), rows.sums.shape[0]
    sums = rows.sums.cpu().numpy()
    np.testing.assert_allclose(sums.sum(1).reshape(2, 2, -1), wide.sum(2, dtype=np.float64), atol=1e-4)
    # the 16 sums may be added in any order, so an integer halfway between two may be the other one
    mean = sums.sum(1, dtype=np.float64).reshape(2, 2, 1, -1) / 150
    values, scale = quantize_rows((wide - mean).astype(np.float32))
    near = np.abs(rows.k.cpu().numpy().reshape(values.shape).astype(int) - values)
    assert near.max() <= 1
    assert near.mean() < 1e-3
    np.testing.assert_allclose(rows.k_scale.cpu().numpy().reshape(scale.shape), scale, rtol=1e-6)
    assert members == 4


def test_smoothed_keys_keep_attention_where_channels_stand_out(device):
    """Channels in which all keys are near one large number; without smoothing, int8 loses more."""
    q, k, v = drawn(150, device)
    k[..., ::32] += 30
    heads = [per_head(x) for x in (q, k, v)]
    want = exact(*heads)
    assert error(kernels.attention(q, k, v).float().cpu().numpy(), joined(want)) < 0.02
    assert error(reference.attention(*heads, smooth=False), want) > 0.05


def test_what_is_not_finite_shows(device):
    q, k, v = drawn(70, device)
    q[0, 3, 1, 5] = float("nan")
    found = kernels.attention(q, k, v)[0].view(70, 2, 128).isfinite().all(-1)
    assert not found[3, 1]
    assert int((~found).sum()) == 1
    k[0, 60, 0, 7] = float("inf")
    found = kernels.attention(q, k, v)[0].view(70, 2, 128).isfinite()
    assert not found[:, 0].any()


def test_nothing_is_launched_for_nothing(device):
    assert kernels.attention(*drawn(0, device)).shape == (1, 0, 256)


def test_an_architecture_without_a_tile_of_its_own_takes_the_usual_one():
    assert tiles.attention_tile("sm_90") == tiles.attention_tile("default")
    assert tiles.attention_tile("sm_121") == tiles.attention_tile("sm_120")


def test_one_table_of_heads_is_stated_twice():
    assert dispatch.INT8_ATTENTION_HEADS == kernels.HEADS


@pytest.fixture
def geforce(monkeypatch):
    """Kernels run, and the GPU is one that gains; the list counts calls."""
    monkeypatch.setattr(dispatch, "KERNELS", "on")
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_89")
    ran, real = [], kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *heads: (ran.append(1), real(*heads))[1])
    return ran


@pytest.mark.parametrize("lead", [(), (2,), (2, 1)])
def test_the_models_attention_takes_it(lead, device, geforce, monkeypatch):
    monkeypatch.setattr(dispatch, "INT8_ATTENTION_FROM", 37)
    q, k, v = (x.reshape(*lead, 37, 2, 64) for x in drawn(37, device, 64, sequences=max(1, sum(lead[:1]))))
    usual, got = (module.attention(q, k, v, in_int8=on) for on in (False, True))
    assert geforce == [1]
    assert got.shape == usual.shape == (*lead, 37, 128)
    assert got.dtype == usual.dtype
    assert 1e-4 < error(got.double().cpu().numpy(), usual.double().cpu().numpy()) < 0.02


def test_what_does_not_suit_takes_the_usual_attention(device, geforce, monkeypatch):
    monkeypatch.setattr(dispatch, "INT8_ATTENTION_FROM", 37)
    q, k, v = (x[0] for x in drawn(37, device, 64))
    narrow = q[..., :48]
    module.attention(q, k, v)
    module.attention(q, k, v, causal=True, in_int8=True)
    module.attention(q, k[:, :1], v[:, :1], in_int8=True)
    module.attention(q[:36], k[:36], v[:36], in_int8=True)
    module.attention(narrow, narrow, narrow, in_int8=True)
    module.attention(q.float(), k.float(), v.float(), in_int8=True)
    module.attention(q.float().requires_grad_(), k.float(), v.float(), in_int8=True).sum().backward()
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    module.attention(q, k, v, in_int8=True)
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_89")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module.attention(q, k, v, in_int8=True)
    assert not geforce


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whole_image_on_a_gpu_replayed_from_a_graph(dtype):
    """4,128 tokens, the first queries of each head against float64, then the same from a CUDA graph."""
    q, k, v = drawn(4128, torch.device("cuda"), heads=30, dtype=dtype)
    k[..., ::32] += 30
    got = kernels.attention(q, k, v)
    few, keys, values = (x[0].double().transpose(0, 1) for x in (q[:, :40], k, v))
    want = (few @ keys.mT * 128**-0.5).softmax(-1) @ values
    found = got[0, :40].double().view(40, 30, 128).transpose(0, 1)
    assert float((found - want).norm() / want.norm()) < 0.03
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = kernels.attention(q, k, v)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, got)
