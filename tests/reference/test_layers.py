"""The float64 layers agree with torch in float64 and have the properties that define them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from zimage_core.reference import layers

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # float64 on both sides, sums of at most 64 terms


def _random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _torch(x):
    return torch.from_numpy(np.asarray(x, np.float64))


def test_linear_and_norms_are_what_torch_computes():
    x, w, b = _random(3, 5, 24), _random(7, 24, seed=1), _random(7, seed=2)
    np.testing.assert_allclose(layers.linear(x, w, b), F.linear(_torch(x), _torch(w), _torch(b)), **TOLERANCE)
    np.testing.assert_allclose(layers.linear(x, w), F.linear(_torch(x), _torch(w)), **TOLERANCE)
    g = _random(24, seed=3)
    np.testing.assert_allclose(
        layers.rms_norm(x, g, 1e-5), F.rms_norm(_torch(x), (24,), _torch(g), 1e-5), **TOLERANCE
    )
    np.testing.assert_allclose(
        layers.layer_norm(x, 1e-6), F.layer_norm(_torch(x), (24,), eps=1e-6), **TOLERANCE
    )
    image, scale, shift = _random(2, 8, 5, 3), _random(8, seed=4), _random(8, seed=5)
    np.testing.assert_allclose(
        layers.group_norm(image, 4, scale, shift, 1e-6),
        F.group_norm(_torch(image), 4, _torch(scale), _torch(shift), 1e-6),
        **TOLERANCE,
    )


def test_activations_are_what_torch_computes_also_far_out():
    x = np.array([-1e4, -800.0, -3.0, -1e-9, 0.0, 1e-9, 3.0, 800.0, 1e4])
    np.testing.assert_allclose(layers.silu(x), F.silu(_torch(x)), **TOLERANCE)
    np.testing.assert_allclose(layers.softmax(x), F.softmax(_torch(x), -1), **TOLERANCE)
    gate, up, down = _random(12, 6, seed=1), _random(12, 6, seed=2), _random(6, 12, seed=3)
    h = _random(4, 6)
    wanted = (F.silu(_torch(h) @ _torch(gate).T) * (_torch(h) @ _torch(up).T)) @ _torch(down).T
    np.testing.assert_allclose(layers.swiglu(h, gate, up, down), wanted, **TOLERANCE)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_what_torch_computes(key_heads, masked):
    q, k, v = _random(2, 5, 6, 8), _random(2, 7, key_heads, 8, seed=1), _random(2, 7, key_heads, 8, seed=2)
    mask = np.random.default_rng(3).random((5, 7)) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = True
    wanted = F.scaled_dot_product_attention(
        *(_torch(x).transpose(1, 2) for x in (q, k, v)),
        attn_mask=None if mask is None else torch.from_numpy(mask),
        enable_gqa=True,
    ).transpose(1, 2)
    np.testing.assert_allclose(layers.attention(q, k, v, mask), wanted, **TOLERANCE)


def test_causal_attention_does_not_look_ahead():
    q, k, v = (_random(6, 2, 4, seed=s) for s in range(3))
    whole = layers.attention(q, k, v, layers.causal_mask(6))
    np.testing.assert_allclose(whole[:4], layers.attention(q[:4], k[:4], v[:4], layers.causal_mask(4)))
    np.testing.assert_allclose(whole[0], v[0])


def test_a_mask_of_a_batch_is_applied_per_member():
    q, k, v = (_random(2, 4, 2, 4, seed=s) for s in range(3))
    mask = np.ones((2, 4, 4), bool)
    mask[1, :, 3] = False
    out = layers.attention(q, k, v, mask)
    np.testing.assert_allclose(out[0], layers.attention(q[0], k[0], v[0]))
    np.testing.assert_allclose(out[1], layers.attention(q[1], k[1, :3], v[1, :3]))


def test_interleaved_rope_is_a_complex_product():
    x, positions = _random(5, 3, 8), np.array([0, 1, 7, 100, 3])
    angles = layers.rope_angles(positions, 8, 256.0)
    as_complex = x[..., 0::2] + 1j * x[..., 1::2]
    wanted = as_complex * np.exp(1j * angles)[:, None]
    got = layers.rope_interleaved(x, angles)
    np.testing.assert_allclose(got[..., 0::2] + 1j * got[..., 1::2], wanted, **TOLERANCE)


def test_half_split_rope_is_the_other_with_its_channels_reordered():
    x, angles = _random(5, 3, 8), layers.rope_angles(np.arange(5), 8, 1e6)
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    np.testing.assert_allclose(
        layers.rope_half_split(x, angles)[..., order],
        layers.rope_interleaved(x[..., order], angles),
        **TOLERANCE,
    )


@pytest.mark.parametrize("rotate", [layers.rope_interleaved, layers.rope_half_split])
@given(shift=st.integers(0, 500), a=st.integers(0, 500), b=st.integers(0, 500))
def test_rotated_products_depend_on_the_distance_only(rotate, shift, a, b):
    q, k = _random(1, 1, 16, seed=1), _random(1, 1, 16, seed=2)

    def product(i, j):
        return np.sum(
            rotate(q, layers.rope_angles(np.array([i]), 16, 256.0))
            * rotate(k, layers.rope_angles(np.array([j]), 16, 256.0))
        )

    np.testing.assert_allclose(product(a + shift, b + shift), product(a, b), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(product(a, a), np.sum(q * k), rtol=1e-9, atol=1e-9)


def test_axes_have_their_own_frequencies_side_by_side():
    positions = np.array([[0, 0, 0], [1, 2, 3], [40, 5, 6]])
    angles = layers.rope_angles_axes(positions, (4, 6, 8), 256.0)
    assert angles.shape == (3, 9)
    np.testing.assert_array_equal(angles[:, :2], layers.rope_angles(positions[:, 0], 4, 256.0))
    np.testing.assert_array_equal(angles[:, 5:], layers.rope_angles(positions[:, 2], 8, 256.0))
    np.testing.assert_allclose(angles[1], [1, 256**-0.5, 2, *(2 * 256 ** (-i / 3) for i in (1, 2)), 3,
                                           *(3 * 256 ** (-i / 4) for i in (1, 2, 3))])  # fmt: skip


def test_timestep_embedding_starts_at_frequency_one():
    out = layers.timestep_embedding(np.array([0.0, 1.5]), 8)
    np.testing.assert_array_equal(out[0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(out[1, [0, 1, 4, 5]], [np.cos(1.5), np.cos(0.15), np.sin(1.5), np.sin(0.15)])


def test_inputs_are_widened_before_any_arithmetic():
    x = np.full((1, 4), 1e30, np.float32)  # its square overflows float32
    np.testing.assert_allclose(layers.rms_norm(x, np.ones(4, np.float32), 1e-6), np.ones((1, 4)))
    assert layers.linear(x, np.ones((2, 4), np.float32)).dtype == np.float64
