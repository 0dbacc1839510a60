"""A tiny random SigLIP2 vision tower of transformers, and its files under several names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.model_files import Stored, stored
from tests.helpers.parity import Difference, Outputs, compare, drawn, randomise, record
from tests.helpers.tree import ROOT
from zimage_core.config import VisionConfig
from zimage_core.models.vision_tower import VisionTower
from zimage_core.vision.processor import Processor
from zimage_core.weights import names

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_patches": 64, "patch_size": 4,
}  # fmt: skip
CONFIG = VisionConfig(
    hidden_size=48, num_layers=3, num_heads=4, intermediate_size=96, patch_size=4, num_patches=64
)
PREFIX = "vision_model."
GRIDS = [(1, 1), (1, 16), (16, 1), (3, 5), (8, 8), (7, 9), (2, 31)]
PICTURES = sorted((ROOT / "docs" / "images").glob("*.png"))
IMAGES = [path for path in PICTURES if path.stem in ("edits", "quality")]


def their_tower(seed: int = 0, **sizes: Any) -> Any:
    """transformers' model with weights that make every part count."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(seed)
    model = Siglip2VisionModel(Siglip2VisionConfig(**{**SIZES, "vision_use_head": False, **sizes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = name.endswith("weight") and "norm" in name
            p.normal_(float(scale), 0.2 if p.ndim < 2 else 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers, of any version, without the prefix and the pooling head."""
    bare = {name.removeprefix(PREFIX): value.detach().clone() for name, value in state.items()}
    return {name: value for name, value in bare.items() if not name.startswith("head.")}


def our_tower(model: Any) -> VisionTower:
    """Our tower with the weights of transformers' model."""
    tower = VisionTower(VisionConfig.from_json(model.config.to_dict()))
    state = {name.removeprefix("encoder."): value for name, value in plain_names(model.state_dict()).items()}
    tower.load_state_dict(state)
    return tower.eval()


def image(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Noise on a slope, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 160, height * width * 3).reshape(height, width, 3)
    return (slope + rng.integers(0, 95, (height, width, 3))).astype(np.uint8)


def their_processor(**options: Any) -> Any:
    """transformers' image processor that needs no torchvision."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    return Siglip2ImageProcessorPil(**options)


def their_inputs(processor: Any, pixels: np.ndarray[Any, Any]) -> Any:
    """What the processor makes of uint8 [H, W, 3]."""
    return processor(images=[pixels], return_tensors="pt", input_data_format="channels_last")


def vision_differences(grid: tuple[int, int]) -> list[Difference]:
    """Every layer's output and the last hidden state; transformers runs with padding and its mask."""

    @torch.no_grad()
    def run() -> Outputs:
        theirs = their_tower()
        randomise(theirs, 0.15)
        ours = our_tower(theirs)
        layers = [f"layers.{i}" for i in range(CONFIG.num_layers)]
        got_layers = record(ours, layers)
        want_layers = record(theirs, [f"encoder.{name}" for name in layers])
        x = drawn(torch.Generator().manual_seed(4), grid[0] * grid[1], CONFIG.patch_dim)
        padded = torch.cat([x, torch.full((9, CONFIG.patch_dim), 7.0)])
        mask = (torch.arange(len(padded)) < len(x)).int()
        want = theirs(padded[None], mask[None], torch.tensor([grid])).last_hidden_state[0, : len(x)]
        pairs = {"last_hidden_state": (want, ours(x, grid))}
        for name in layers:
            pairs[name] = (want_layers[f"encoder.{name}"][0][0, : len(x)], got_layers[name][0])
        return pairs

    return compare("vision tower", f"{grid[0]} x {grid[1]} patches", run)


def picture_difference(path: Path) -> Difference:
    """From a file's pixels to features: each side's processor, whose patches are float32, then its tower."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    inputs = dict(their_inputs(their_processor(), pixels))
    length = int(inputs["pixel_attention_mask"].sum())
    patches, grid = Processor().patches(pixels)

    @torch.no_grad()
    def run() -> Outputs:
        theirs = their_tower(num_patches=256, patch_size=16)
        randomise(theirs, 0.1)
        dtype = torch.get_default_dtype()
        given = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
        want = theirs(**given).last_hidden_state[0, :length]
        return {"last_hidden_state": (want, our_tower(theirs)(patches.to(dtype), grid))}

    (found,) = compare("vision tower", f"{path.name}, through the image processor", run)
    return found


def safetensors_file(path: Path, model: Any, prefix: str = PREFIX, **others: Tensor) -> Path:
    """transformers' file of a tower."""
    state = {prefix + name: value for name, value in plain_names(model.state_dict()).items()}
    save_file(state | others, path, {"format": "pt"})
    return path


def mmproj_content(
    matrix: str, layout: str = "mmproj", config: VisionConfig = CONFIG, seed: int = 0
) -> Stored:
    """Random packed tensors under the names of an mmproj."""
    shapes = names.checkpoint_shapes(names.vision_table(config, layout))
    return stored(shapes, matrix=matrix, seed=seed)


def mmproj_keys(config: VisionConfig = CONFIG) -> dict[str, Any]:
    """What llama.cpp writes about a tower."""
    return {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.use_gelu": True,
        "clip.vision.block_count": config.num_layers,
        "clip.vision.embedding_length": config.hidden_size,
        "clip.vision.attention.head_count": config.num_heads,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
    }
