"""Write the trained Omni sibling as the files that ship with the package.

    python -m benchmarks.nano.export_omni --runs RUNS [--to zimage_core/assets/omni]

transformer.gguf holds Q5_0 where rows are whole blocks of 32, F16 for w2 (rows of 682) and F32 for vectors;
its text encoder and VAE are the embedded model's. siglip.gguf is the vision tower in llama.cpp's mmproj
layout, F16; preprocessor_config.json says how many patches an image gets.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from benchmarks.nano.draw import SIZE
from benchmarks.nano.export import DEFAULT_SIZE_KEY, gather
from benchmarks.nano.model import TRANSFORMER
from benchmarks.nano.model_omni import (
    FEATURES,
    GRID,
    PATCH,
    TOWER_HEADS,
    TOWER_HIDDEN,
    TOWER_LAYERS,
)
from zimage_core.config import VisionConfig
from zimage_core.weights.names import transformer_table, vision_table

OMNI = Path(__file__).parents[2] / "zimage_core" / "assets" / "omni"
TOWER = VisionConfig(
    hidden_size=FEATURES,
    num_layers=TOWER_LAYERS,
    num_heads=TOWER_HEADS,
    intermediate_size=TOWER_HIDDEN,
    patch_size=PATCH,
    num_patches=GRID * GRID,
)


def _begin(path: Path, arch: str, name: str) -> GGUFWriter:
    writer = GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_description("Toy Z-Image-Omni trained from scratch on procedural drawings (benchmarks/nano)")
    return writer


def _finish(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path.name:28} {path.stat().st_size:>10,} bytes")


def export_transformer(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write the transformer from its averaged float32 weights."""
    config, kind = replace(TRANSFORMER, siglip_feat_dim=FEATURES), GGMLQuantizationType.Q5_0
    writer = _begin(path, "lumina2", "Nano Z-Image Omni")
    writer.add_uint32(DEFAULT_SIZE_KEY, SIZE)
    writer.add_file_type(LlamaFileType.MOSTLY_Q5_0)
    writer.add_quantization_version(2)
    for name, values in gather(transformer_table(config, "fused"), weights).items():
        if values.ndim == 1 or values.shape[0] == 1:
            writer.add_tensor(name, values)
        elif values.shape[-1] % 32:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    _finish(writer, path)


def export_tower(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write the vision tower, and beside it the settings of its image processor."""
    writer = _begin(path, "clip", "Nano Z-Image Omni vision tower")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for key, value in (
        ("block_count", TOWER_LAYERS),
        ("embedding_length", FEATURES),
        ("feed_forward_length", TOWER_HIDDEN),
        ("attention.head_count", TOWER_HEADS),
        ("patch_size", PATCH),
        ("image_size", SIZE),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", TOWER.layer_norm_eps)
    for name, values in gather(vision_table(TOWER, "mmproj"), weights).items():
        writer.add_tensor(name, values if values.ndim == 1 else values.astype(np.float16))
    _finish(writer, path)
    settings = {
        "image_processor_type": "Siglip2ImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": PATCH,
        "max_num_patches": GRID * GRID,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (path.parent / "preprocessor_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=OMNI)
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    found = {n: w.float() for n, w in torch.load(args.runs / "omni.pt", weights_only=True)["ema"].items()}
    dit = {n.removeprefix("transformer."): w for n, w in found.items() if n.startswith("transformer.")}
    # the library names the layers of the tower without `encoder.`
    tower = {
        n.removeprefix("siglip.").removeprefix("encoder."): w
        for n, w in found.items()
        if n.startswith("siglip.")
    }
    export_transformer(dit, args.to / "transformer.gguf")
    export_tower(tower, args.to / "siglip.gguf")


if __name__ == "__main__":
    main()
