"""A tiny Omni pipeline of this library alone: in memory, or as a folder that a memory budget can plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import tiny
from zimage_core.config import TransformerConfig, VisionConfig
from zimage_core.models.omni import OmniTransformer
from zimage_core.models.vision_tower import VisionTower
from zimage_core.pipeline import ZImagePipeline

WIDTH = 24
"""Channels of the vision features."""
VISION: dict[str, Any] = {
    "model_type": "siglip2_vision_model", "architectures": ["Siglip2VisionModel"], "hidden_size": WIDTH,
    "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "num_patches": 16,
    "patch_size": 16,
}  # fmt: skip
TRANSFORMER = tiny.TRANSFORMER | {"siglip_feat_dim": WIDTH}


def transformer() -> OmniTransformer:
    """The transformer of seed 0."""
    return tiny._randomised(OmniTransformer(TransformerConfig.from_json(TRANSFORMER)), 0, 0.15)


def tower(width: int = WIDTH) -> VisionTower:
    """The vision tower of seed 3."""
    config = VisionConfig.from_json(VISION | {"hidden_size": width})
    return tiny._randomised(VisionTower(config), 3, 0.15)


def pipeline(kind: Any = ZImagePipeline, **changes: Any) -> Any:
    """A new pipeline in memory; `changes` are other components."""
    made = tiny.pipeline().components | {"transformer": transformer(), "siglip": tower(), **changes}
    return kind(**made, sample_size=tiny.SIZE)


def folder(where: Path, vision: bool = True) -> Path:
    """The pipeline of the same seeds as a diffusers folder."""
    tiny.folder(where)
    parts = {"transformer": (transformer().state_dict(), TRANSFORMER, "diffusion_pytorch_model.safetensors")}
    if vision:
        state = {_theirs(name): value for name, value in tower().state_dict().items()}
        parts["siglip"] = (state, VISION, "model.safetensors")
    for name, (state, config, file) in parts.items():
        (where / name).mkdir(exist_ok=True)
        values = {k: v.contiguous() for k, v in state.items()}
        save_file(values, where / name / file, metadata={"format": "pt"})
        tiny.write_json(where / name / "config.json", config)
    if vision:
        (where / "siglip_processor").mkdir()
        values = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 12, "patch_size": 16}
        tiny.write_json(where / "siglip_processor" / "preprocessor_config.json", values)
    tiny.write_json(where / "model_index.json", {"_class_name": "ZImageOmniPipeline"})
    return where


def _theirs(name: str) -> str:
    return f"vision_model.encoder.{name}" if name.startswith("layers.") else f"vision_model.{name}"


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw(pipe: Any, prompt: Any = "a red circle", **call: Any) -> torch.Tensor:
    """Latents of a short call."""
    short = {"seed": 4, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent"}
    return pipe(prompt=prompt, **{**short, **call}).images
