"""Guidance is the published formula; its cap and its switch-off behave as in diffusers."""

import pytest
import torch

from zimage_core.sampling.guidance import guide, scale_at

POSITIVE, NEGATIVE = torch.randn(2, 1, 4, 3, 5, generator=torch.Generator().manual_seed(3))


def test_scale_counts_from_zero():
    assert torch.equal(guide(POSITIVE, NEGATIVE, 0.0), POSITIVE)
    conventional = NEGATIVE + 5.0 * (POSITIVE - NEGATIVE)
    # two orders of the same four float32 operations
    torch.testing.assert_close(guide(POSITIVE, NEGATIVE, 4.0), conventional, rtol=0, atol=5e-6)


@pytest.mark.parametrize("cap", [True, 1.0, 0.5])
def test_normalization_caps_the_norm_over_all_elements(cap):
    got = guide(POSITIVE, NEGATIVE, 4.0, cap)
    assert float(got.norm()) == pytest.approx(float(POSITIVE.norm()) * float(cap), rel=1e-5)
    plain = guide(POSITIVE, NEGATIVE, 4.0)
    torch.testing.assert_close(got / got.norm(), plain / plain.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cap", [False, 0.0, 100.0])
def test_normalization_off_or_out_of_reach_changes_nothing(cap):
    assert torch.equal(guide(POSITIVE, NEGATIVE, 4.0, cap), guide(POSITIVE, NEGATIVE, 4.0))


def test_half_precision_predictions_are_combined_in_float32():
    got = guide(POSITIVE.half(), NEGATIVE.half(), 4.0)
    assert torch.equal(got, guide(POSITIVE.half().float(), NEGATIVE.half().float(), 4.0))


@pytest.mark.parametrize(
    ("time", "truncation", "scale"),
    [(0.2, 1.0, 4.0), (1.0, 1.0, 4.0), (0.6, 0.5, 0.0), (0.5, 0.5, 4.0), (0.9, None, 4.0), (0.9, 1.5, 4.0)],
)
def test_truncation_switches_guidance_off_beyond_a_time(time, truncation, scale):
    assert scale_at(time, 4.0, truncation) == scale
