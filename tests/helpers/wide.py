"""A toy transformer whose rows blocks of 256 divide, with the head size of real ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers import tiny
from zimage_core.config import TransformerConfig
from zimage_core.models.transformer import ZImageTransformer

WIDE = {
    **tiny.TRANSFORMER, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
    "cap_feat_dim": 256,
}  # fmt: skip
"""Rows of 256; those of w2 have 682 weights, which no block divides."""


def wide_state(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in diffusers' names."""
    with torch.device("meta"):
        model = ZImageTransformer(TransformerConfig.from_json(WIDE))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, p in model.state_dict().items():
        noise = torch.randn(p.shape, generator=generator) * 0.05
        state[name] = (noise + ("norm" in name)).to(dtype)
    return state


def write_wide(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A diffusers component folder."""
    folder.mkdir(parents=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(WIDE))
    return folder
