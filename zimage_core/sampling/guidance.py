"""Classifier-free guidance: how two predictions become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Network = Callable[[list[torch.Tensor], torch.Tensor, list[torch.Tensor]], list[torch.Tensor]]


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


@dataclass
class Guided:
    """A network and its captions as a denoiser for `euler.sample`; positive and negative side in one call.

    Args:
        network: (latents, each [C, 1, h, w]; times [B]; captions, each [L, D]) -> predictions like the
            latents.
        positive: Caption features, one [L, D] per picture; may be replaced between steps.
        negative: The same for the negative prompt; not used when scale is 0.
        scale: See `guide`.
        normalization: See `guide`.
        truncation: See `scale_at`.
        dtype: In which the network takes its latents.
        last: Latents and time of the latest call, to repeat it when something went wrong.
    """

    network: Network
    positive: list[torch.Tensor]
    negative: list[torch.Tensor]
    scale: float = 0.0
    normalization: float | bool = False
    truncation: float | None = 1.0
    dtype: torch.dtype = torch.float32
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, latents: torch.Tensor, time: torch.Tensor, step: int) -> torch.Tensor:
        """latents [B, C, h, w] float32, time [] float32 -> estimate of clean - noise [B, C, h, w] float32."""
        self.last = (latents, time)
        scale = scale_at(float(time), self.scale, self.truncation)
        members = list(latents.to(self.dtype).unsqueeze(2))  # the network counts frames
        captions = self.positive
        if scale > 0:
            members, captions = members * 2, captions + self.negative
        out = self.network(members, time.expand(len(members)), captions)
        out = [prediction.float().squeeze(1) for prediction in out]
        if scale > 0:
            count = len(latents)
            sides = zip(out[:count], out[count:], strict=True)
            out = [guide(pos, neg, scale, self.normalization) for pos, neg in sides]
        return torch.stack(out)
