"""Variety: a distilled model's images of one prompt are alike, unless each seed moves the prompt a little."""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.sampling.noise import MAX_SEED


def vary(caption: Tensor, seed: int, amount: float) -> Tensor:
    """Add uniform noise of `amount` standard deviations to half of a caption's entries.

    Args:
        caption: Caption features [L, cap_feat_dim]; not modified.
        seed: Seed of the image: the noise is drawn from it and the mask from the next one, on the CPU.
        amount: Largest change in standard deviations of the whole caption.

    Source: InvokeAI's seed variance: e + mask * U(-1, 1) * amount * std(e).
    """
    noise, mask = (
        torch.rand(caption.shape, generator=torch.Generator().manual_seed(each))
        for each in (seed, (seed + 1) % (MAX_SEED + 1))
    )
    features = caption.float()
    change = (mask < 0.5) * (2 * noise - 1) * (amount * float(features.std()))
    return (features + change.to(caption.device)).to(caption.dtype)
