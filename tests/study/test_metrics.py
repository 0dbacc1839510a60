"""Metrics against their definitions written out, and against values known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zimage_core.errors import BadShape
from zimage_core.study.metrics import psnr, relative_error, ssim


def image(seed: int, shape=(3, 24, 30)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def ssim_written_out(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, as in the paper; [H, W] of values up to 1."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
            values.append(top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
    return float(np.mean(values))


def test_ssim_is_the_definition_window_by_window():
    a, b = image(0), image(1)
    b = 0.7 * a + 0.3 * b
    channels = zip(a.double().numpy(), b.double().numpy(), strict=True)
    wanted = np.mean([ssim_written_out(x, y) for x, y in channels])
    assert ssim(a, b) == pytest.approx(wanted, abs=1e-12)  # float64, sums in another order
    assert 0.5 < ssim(a, b) < 0.99


def test_ssim_of_flat_images_is_the_term_of_luminance():
    one, two = torch.full((3, 16, 16), 0.25), torch.full((3, 16, 16), 0.5)
    assert ssim(one, two) == pytest.approx((2 * 0.125 + 1e-4) / (0.0625 + 0.25 + 1e-4), abs=1e-9)


def test_ssim_of_equals_is_one_and_of_an_inversion_negative():
    a = image(2)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    assert ssim(a, 1 - a) < 0
    assert ssim(a, image(3)) == ssim(image(3), a)


def test_the_range_of_values_cancels():
    a, b = image(4), image(5)
    assert ssim(255 * a, 255 * b, peak=255) == pytest.approx(ssim(a, b), abs=1e-6)  # a * 255 is rounded
    assert psnr(255 * a, 255 * b, peak=255) == pytest.approx(psnr(a, b), abs=1e-5)


def test_psnr_in_closed_form():
    a = torch.zeros(3, 4, 4)
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-5)  # 0.1 in float32
    assert psnr(a, a + 1) == 0.0
    assert psnr(a, a) == math.inf


def test_relative_error_in_closed_form():
    b = torch.tensor([3.0, 4.0])
    assert relative_error(b * 1.5, b) == pytest.approx(0.5)
    assert relative_error(b, b) == 0.0
    assert relative_error(b, torch.zeros(2)) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


@pytest.mark.parametrize("measure", [psnr, ssim, relative_error])
def test_other_shapes_are_refused(measure):
    with pytest.raises(BadShape, match=r"\(3, 16, 16\) and \(3, 16, 17\)"):
        measure(torch.zeros(3, 16, 16), torch.zeros(3, 16, 17))


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(BadShape, match="at least 11"):
        ssim(torch.zeros(3, 10, 16), torch.zeros(3, 10, 16))
