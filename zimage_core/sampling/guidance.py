"""Classifier-free guidance: how two predictions become one."""

from __future__ import annotations

import torch


def scale_at(time: float, scale: float, truncation: float | None) -> float:
    """Guidance at network time `time` (0 noise, 1 clean): off beyond `truncation`, if that is at most 1."""
    return 0.0 if truncation is not None and truncation <= 1 and time > truncation else scale


def guide(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, normalization: float | bool = False
) -> torch.Tensor:
    """positive + scale (positive - negative), for one image.

    A scale of 0 means no guidance. The conventional "CFG" of c, negative + c (positive - negative), is the
    scale c - 1 here.

    Args:
        positive: Prediction for the prompt.
        negative: Prediction for the negative prompt.
        scale: Strength of the guidance; 0 returns the positive prediction.
        normalization: If not 0 or False, the result's norm is at most this many times that of `positive`.

    Shape:
        positive and negative of one shape -> that shape, float32. The norms are over all elements.

    Source: Ho and Salimans 2022, arXiv 2207.12598; the cap is diffusers' `cfg_normalization`.
    """
    positive, negative = positive.float(), negative.float()
    guided = positive + scale * (positive - negative)
    cap = float(normalization)
    if cap > 0:
        most = torch.linalg.vector_norm(positive) * cap
        norm = torch.linalg.vector_norm(guided)
        if norm > most:
            guided = guided * (most / norm)
    return guided
