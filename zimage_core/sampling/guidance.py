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

    scale counts from 0: a conventional "CFG" of c, written negative + c (positive - negative), is scale = c -
    1.

    Args:
        positive: Prediction under the prompt.
        negative: Prediction under the negative prompt.
        scale: 0 leaves the positive prediction alone.
        normalization: If not 0 or False, the result's norm is capped at this many times the positive one's.

    Shape:
        positive and negative of one shape -> that shape, float32. The norms run over all elements.

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
