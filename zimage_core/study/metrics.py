"""Measures of the difference of two results: relative error of tensors, PSNR and SSIM of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zimage_core.errors import BadShape

WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation in pixels of SSIM's Gaussian window."""
K1, K2 = 0.01, 0.03
"""SSIM's two stabilising constants, relative to the range of values."""


def relative_error(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference| with Euclidean norms over all elements, in float64; 0 if both are 0.

    Raises:
        BadShape: The shapes differ.
    """
    _same(result, reference)
    far = float(torch.linalg.vector_norm(result.double() - reference.double()))
    size = float(torch.linalg.vector_norm(reference.double()))
    return far / size if size else (math.inf if far else 0.0)


def mean_squared_error(a: Tensor, b: Tensor) -> float:
    """Mean of (a - b)^2, in float64.

    Raises:
        BadShape: The shapes differ.
    """
    _same(a, b)
    return float((a.double() - b.double()).square().mean())


def decibels(mean_square: float, peak: float = 1.0) -> float:
    """PSNR in dB of a mean squared error: 10 log10(peak^2 / error); infinite if the error is 0."""
    return 10 * math.log10(peak**2 / mean_square) if mean_square else math.inf


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio of two images in dB over all pixels and channels; infinite if equal.

    Args:
        a: An image of any shape, values from 0 to `peak`.
        b: The other image, of the same shape.
        peak: The largest possible value: 1, or 255 for bytes.

    Raises:
        BadShape: The shapes differ.
    """
    return decibels(mean_squared_error(a, b), peak)


def ssim(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Structural similarity of two images: 1 if they are equal, about 0 if they are unrelated.

    The window is a Gaussian of 11 x 11 pixels with sigma 1.5, at all positions inside the image; moments are
    biased. The result is the mean over positions and channels.

    Args:
        a: An image [..., H, W], values from 0 to `peak`, H and W at least 11.
        b: The other image, of the same shape.
        peak: The largest possible value: 1, or 255 for bytes.

    Raises:
        BadShape: The shapes differ, or are smaller than the window.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, IEEE Transactions on Image Processing 13(4), equation 13.
    """
    _same(a, b)
    if a.ndim < 2 or min(a.shape[-2:]) < WINDOW:
        raise BadShape(f"ssim: images of shape {tuple(a.shape)}, sides of at least {WINDOW} are wanted")
    x, y = (image.double().reshape(-1, 1, *image.shape[-2:]) for image in (a, b))
    mx, my = _blur(x), _blur(y)
    vx, vy, cov = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    likeness = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(likeness.mean())


def _blur(x: Tensor) -> Tensor:
    """Means over the window at every position inside: [N, 1, H, W] -> [N, 1, H - 10, W - 10]."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-offset.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    rows = torch.nn.functional.conv2d(x, weights.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, -1))


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise BadShape(f"compared tensors have the shapes {tuple(a.shape)} and {tuple(b.shape)}")
