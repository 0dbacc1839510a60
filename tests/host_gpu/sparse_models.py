"""Full-size model files with true headers and holes in place of weights: seconds to write, no disk.

    python -m tests.host_gpu.sparse_models FOLDER [MIX...]

Each mix gets a folder with Z-Image's transformer (6.15 G weights), Qwen3-4B with its tokenizer, and the VAE.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.make_full_size import Options, make, write_transformer
from zimage_core.config import TransformerConfig, VisionConfig
from zimage_core.control.config import ControlConfig
from zimage_core.control.load import control_table
from zimage_core.weights import names
from zimage_core.weights.controlnets import SHARED

MIXES = ("Q4_K_M", "Q3_K_S", "Q8_0")


def write_models(folder: Path, mix: str = "Q4_K_M", layers: int = 30) -> Path:
    """Write what is missing of a mix's three files -> their folder."""
    made = folder / (mix if layers == 30 else f"{mix}-{layers}")
    make(made, layers, options=Options(mix, sparse=True))
    return made


def write_controlnet(folder: Path) -> Path:
    """Write a ControlNet of the layout of Union 2.0, 2.95 G weights in bfloat16, as a header and a hole."""
    layers = 15
    config = ControlConfig(
        dim=3840,
        n_heads=30,
        hidden_dim=10240,
        channels=33,
        n_layers=layers,
        n_refiner_layers=0,
        refiner=SHARED,
    )
    shapes = {entry.checkpoint: entry.shape for entry in control_table(config, "split")}
    return _hole(folder / "union.safetensors", shapes)


def write_omni(folder: Path, mix: str = "Q4_K_M") -> Path:
    """Write what is missing of Omni's transformer, of the two files beside it, and of its vision tower.

    The tower, 0.41 G weights in bfloat16, is in the folder `siglip`.
    """
    made = folder / f"omni-{mix}"
    if not made.exists():
        plain = write_models(folder, mix)
        (made / "siglip").mkdir(parents=True)
        for name in ("text_encoder.gguf", "vae.safetensors"):
            (made / name).symlink_to(plain / name)
        tower = VisionConfig()
        config = TransformerConfig(siglip_feat_dim=tower.hidden_size)
        write_transformer(made / "transformer.gguf", config, Options(mix, sparse=True))
        shapes = names.checkpoint_shapes(names.vision_table(tower, "hf"))
        _hole(made / "siglip/model.safetensors", shapes)
    return made


def _hole(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write safetensors in bfloat16 as a header and a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


if __name__ == "__main__":
    for each in sys.argv[2:] or MIXES:
        print(write_models(Path(sys.argv[1]), each))
