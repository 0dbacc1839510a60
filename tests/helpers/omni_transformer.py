"""Tiny Omni transformers and the inputs of a call, without diffusers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers import tiny
from zimage_core.config import TransformerConfig
from zimage_core.models.omni import OmniTransformer, Reference

WIDTH = 12
"""Numbers of a vision feature."""
CONFIG: dict[str, Any] = tiny.TRANSFORMER | {"siglip_feat_dim": WIDTH}


class Call(NamedTuple):
    """One sample: pieces of text, references, the target and its time."""

    pieces: list[Tensor]
    references: list[Reference]
    target: Tensor
    time: float = 0.3

    @property
    def arguments(self) -> dict[str, Any]:
        """As diffusers' call takes them."""
        latents = [None if r.latent is None else r.latent[:, None] for r in self.references]
        features = [*(r.features for r in self.references), None] if self.references else None
        return {
            "x": [[*latents, self.target[:, None]]], "t": torch.tensor([self.time]),
            "cap_feats": [self.pieces], "siglip_feats": [features],
        }  # fmt: skip


def transformer(seed: int = 0) -> OmniTransformer:
    """Random weights."""
    model = OmniTransformer(TransformerConfig.from_json(CONFIG)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + ("norm" in name))
    return model


def call(
    images: int = 2, pieces: tuple[int, ...] = (5, 2, 37, 3), width: int = 24, features: int = WIDTH
) -> Call:
    """References of odd sizes, none of whose tokens fill 32; `width` is that of the text's features."""
    g = torch.Generator().manual_seed(1)
    text = [torch.randn(n, width, generator=g) for n in pieces]
    references = [
        Reference(
            torch.randn(16, 4 + 2 * k, 6, generator=g), torch.randn(3 + k, 4 + 2 * k, features, generator=g)
        )
        for k in range(images)
    ]
    return Call(text, references, torch.randn(16, 6, 8, generator=g))
