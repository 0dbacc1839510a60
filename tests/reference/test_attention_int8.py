"""Defends: smoothed keys change no attention, and let int8 keep it where some channels are large."""

from __future__ import annotations

import numpy as np
import pytest

from zimage_core.reference import attention_int8 as reference

TOKENS, HEAD = 160, 128


def drawn(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, TOKENS, HEAD)) for _ in range(3)]


def exact(q, k, v):
    return reference.softmax(q @ k.swapaxes(-1, -2) * HEAD**-0.5) @ v


def error(found, wanted) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture
def outliers():
    """Four channels in which all keys are near the same large number, as those of real heads are."""
    q, k, v = drawn(0)
    k[..., ::32] += 30
    return q, k, v


def test_the_mean_of_the_keys_does_not_matter(outliers):
    q, k, v = outliers
    np.testing.assert_allclose(exact(q, reference.smoothed(k), v), exact(q, k, v), rtol=1e-9, atol=1e-12)


def test_smoothed_keys_keep_attention_where_channels_stand_out(outliers):
    wanted = exact(*outliers)
    assert error(reference.attention(*outliers), wanted) < 0.02
    assert error(reference.attention(*outliers, smooth=False), wanted) > 0.05


def test_gaussian_keys_lose_nothing_by_it():
    q, k, v = drawn(1)
    wanted = exact(q, k, v)
    plain, smooth = (error(reference.attention(q, k, v, smooth=on), wanted) for on in (False, True))
    assert smooth < 1.1 * plain < 0.022
