"""Write full-size model files of random blocks: real names, shapes and types, no real weights.

    python -m benchmarks.make_full_size FOLDER [--mix Q4_K_M] [--layers 30] [--bf16] [--sparse]

Makes transformer.gguf (6.15 G weights, 5.0 GB), text_encoder.gguf (Qwen3-4B with the real vocabulary,
2.5 GB) and vae.safetensors (336 MB), in the types of a standard mix; with --bf16 a bf16.safetensors of the
transformer instead (12.3 GB), to be quantised. The images are noise; times, memory and file handling are
those of the real files. With --sparse the files have their headers and holes in place of weights: they need
seconds and next to no disk, and serve where no weight is looked at. A file that exists is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.helpers import qwen_vocabulary
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.export import safetensors_file
from zimage_core.export.mixes import standard_mix
from zimage_core.export.recipes import SOURCE
from zimage_core.formats import FORMATS
from zimage_core.reference.encode import random_blocks
from zimage_core.weights import gguf_writer, names

POOL = 256
"""Distinct rows drawn per type and length; a matrix repeats them in random order, which keeps this quick."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    """Standard mix of the GGUF files, and whether holes are written in place of weights."""

    mix: str = "Q4_K_M"
    sparse: bool = False


DEFAULT = Options()


def write(
    path: Path, layout: gguf_writer.Layout, shapes: Shapes, types: Mapping[str, str], sparse: bool = False
) -> None:
    """Write one file of random rows, deviation 0.02, tensor by tensor; norms are around one.

    A sparse file has holes instead, which read as zeros.
    """
    rng = np.random.default_rng(0)
    pools: dict[tuple[str, int], np.ndarray] = {}
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.nbytes)
        for name, shape in () if sparse else shapes.items():
            fmt = types[name]
            if "norm" in name:  # so that activations stay of order one
                gains = torch.from_numpy(1 + 0.1 * rng.standard_normal(shape))
                data = gains.bfloat16().view(torch.int16) if fmt == "BF16" else gains.float()
                packed = data.numpy()
            else:
                key = (fmt, shape[-1])
                if key not in pools:
                    pools[key] = random_blocks(FORMATS[fmt], (POOL, shape[-1]), rng, 0.02)
                packed = pools[key][rng.integers(0, POOL, int(np.prod(shape[:-1])))]
            file.seek(layout.places[name][0])
            file.write(packed.tobytes())


def write_gguf(
    path: Path, component: str, layers: int, shapes: Shapes, metadata: Mapping[str, object], options: Options
) -> None:
    """One GGUF in the types of a mix whose source was BF16."""
    recipe = standard_mix(options.mix, component, shapes)
    types = {}
    for name, shape in shapes.items():
        chosen = recipe.type_of(name, layers)
        plain = len(shape) == 1 or "pad_token" in name
        types[name] = "F32" if plain else "BF16" if chosen == SOURCE else chosen
    layout = gguf_writer.lay_out(metadata, [(n, s, FORMATS[types[n]]) for n, s in shapes.items()])
    write(path, layout, shapes, types, options.sparse)


def write_transformer(path: Path, config: TransformerConfig, options: Options = DEFAULT) -> None:
    """As the patched llama-quantize writes it."""
    shapes = names.checkpoint_shapes(names.transformer_table(config, "fused"))
    write_gguf(path, "transformer", config.n_layers, shapes, {"general.architecture": "lumina2"}, options)


def write_source(path: Path, config: TransformerConfig, options: Options = DEFAULT) -> None:
    """The transformer in bfloat16, in the single-file layout."""
    shapes = names.checkpoint_shapes(names.transformer_table(config, "fused"))
    layout = safetensors_file.lay_out({}, [(n, s, FORMATS["BF16"]) for n, s in shapes.items()])
    write(path, layout, shapes, dict.fromkeys(shapes, "BF16"), options.sparse)


def write_text_encoder(path: Path, config: TextEncoderConfig, options: Options = DEFAULT) -> None:
    """As llama-quantize writes it: the unused last layer and final norm included, and the real vocabulary."""
    shapes = names.checkpoint_shapes(names.text_encoder_table(config, "gguf"))
    last, before = f"blk.{config.num_layers - 1}.", f"blk.{config.num_layers - 2}."
    shapes = shapes | {n.replace(before, last): s for n, s in shapes.items() if before in n}
    shapes = shapes | {"output_norm.weight": (config.hidden_size,)}
    keys = {
        "block_count": config.num_layers,
        "context_length": 40960,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    metadata = {"general.architecture": "qwen3"} | {f"qwen3.{k}": v for k, v in keys.items()}
    write_gguf(path, "text_encoder", config.num_layers, shapes, metadata | vocabulary(), options)


def vocabulary() -> dict[str, object]:
    """GGUF's tokenizer keys with the real Qwen vocabulary."""
    found = qwen_vocabulary.gguf_metadata()
    return {
        key: gguf_writer.TypedArray(value, "i32") if key.endswith("token_type") else value
        for key, value in found.items()
        if "tokenizer" in key
    }


def write_vae(path: Path, options: Options = DEFAULT) -> None:
    """A full-size Flux VAE with He-like random weights, float32."""
    shapes = names.checkpoint_shapes(names.autoencoder_table(AutoencoderConfig(), "bfl"))
    if options.sparse:
        layout = safetensors_file.lay_out({}, [(n, s, FORMATS["F32"]) for n, s in shapes.items()])
        write(path, layout, shapes, {}, sparse=True)
        return
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            gain = "norm" in name and name.endswith("weight")
            tensors[name] = np.full(shape, float(gain), np.float32)
        else:
            tensors[name] = (rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)
    save_file(tensors, path)


def make(folder: Path, layers: int = 30, bf16: bool = False, options: Options = DEFAULT) -> list[Path]:
    """Write the files that are missing -> those that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TransformerConfig(n_layers=layers)
    jobs: dict[str, Callable[[Path], None]] = {
        "transformer.gguf": lambda path: write_transformer(path, config, options),
        "text_encoder.gguf": lambda path: write_text_encoder(path, TextEncoderConfig(), options),
        "vae.safetensors": lambda path: write_vae(path, options),
    }
    if bf16:
        jobs = {"bf16.safetensors": lambda path: write_source(path, config, options)}
    written = []
    for name, job in jobs.items():
        if not (folder / name).exists():
            job(folder / name)
            written.append(folder / name)
    return written


def main() -> None:
    """Write the files that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=30, help="blocks of the transformer")
    parser.add_argument("--bf16", action="store_true", help="a bfloat16 transformer, to be quantised")
    parser.add_argument("--mix", default=DEFAULT.mix, help=f"standard mix, default {DEFAULT.mix}")
    parser.add_argument("--sparse", action="store_true", help="holes in place of weights")
    args = parser.parse_args()
    for path in make(args.folder, args.layers, args.bf16, Options(args.mix, args.sparse)):
        print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
