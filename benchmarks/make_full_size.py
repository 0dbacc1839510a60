"""Write full-size model files of random blocks: real names, shapes and types, no real weights.

    python -m benchmarks.make_full_size FOLDER [--layers 30]

Makes transformer.gguf (6.15 G weights, 5.0 GB), text_encoder.gguf (Qwen3-4B with the real vocabulary,
2.5 GB) and vae.safetensors (336 MB), in the mix of types of the usual Q4_K_M files. The pictures are noise;
times, memory and file handling are those of the real files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

from tests.helpers import qwen_vocabulary
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.formats import FORMATS
from zimage_core.reference.encode import random_blocks
from zimage_core.weights import names

POOL = 256
"""Distinct rows drawn per type and length; a matrix repeats them in random order, which keeps this quick."""


class Rows:
    """Random packed matrices."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.pools: dict[tuple[str, int], np.ndarray] = {}

    def draw(self, fmt: str, shape: tuple[int, ...]) -> np.ndarray:
        """Packed bytes uint8 [N, row bytes] of `shape` in `fmt`; deviation 0.02."""
        key = (fmt, shape[-1])
        if key not in self.pools:
            self.pools[key] = random_blocks(FORMATS[fmt], (POOL, shape[-1]), self.rng, 0.02)
        return self.pools[key][self.rng.integers(0, POOL, int(np.prod(shape[:-1])))]


def transformer_type(name: str, shape: tuple[int, ...]) -> str:
    """The patched llama-quantize's choice for Q4_K_M; one-dimensional tensors and pad tokens are F32."""
    if len(shape) == 1 or "pad_token" in name:
        return "F32"
    if name.startswith("layers."):
        if "qkv" in name:
            return "Q5_K"
        return "Q6_K" if ".w2." in name else "Q4_K"
    return "BF16"


def text_encoder_type(name: str, shape: tuple[int, ...]) -> str:
    """llama-quantize's choice for Q4_K_M."""
    if len(shape) == 1:
        return "F32"
    if name == "token_embd.weight":
        return "Q6_K"
    if "attn_v" in name or "ffn_down" in name:
        return "Q6_K" if int(name.split(".")[1]) % 2 else "Q4_K"
    return "Q4_K"


def write_gguf(
    path: Path,
    arch: str,
    shapes: dict[str, tuple[int, ...]],
    choose: Callable[[str, tuple[int, ...]], str],
    metadata: Iterable[tuple[str, object]] = (),
) -> None:
    """Stream one file: infos first, then tensor by tensor."""
    writer, rows = gguf.GGUFWriter(path, arch), Rows()
    for key, value in metadata:
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ](key, value)
    for name, shape in shapes.items():
        fmt = FORMATS[choose(name, shape)]
        packed = (*shape[:-1], fmt.row_bytes(shape[-1]))
        kind = gguf.GGMLQuantizationType(fmt.ggml_type)
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        if "norm" in name:  # norms around one, so that activations stay of order one
            data = (1 + 0.1 * rows.rng.standard_normal(shape)).astype(np.float32)
        else:
            data = rows.draw(choose(name, shape), shape)
        writer.write_tensor_data(data)
    writer.close()


def write_vae(path: Path) -> None:
    """A full-size Flux VAE with He-like random weights, float32."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in names.checkpoint_shapes(names.autoencoder_table(AutoencoderConfig(), "bfl")).items():
        if len(shape) == 1:
            tensors[name] = np.full(
                shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0, np.float32
            )
        else:
            tensors[name] = (rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)
    save_file(tensors, path)


def qwen3_shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, the unused last layer and final norm included."""
    shapes = names.checkpoint_shapes(names.text_encoder_table(config, "gguf"))
    last, before = config.num_layers - 1, config.num_layers - 2
    tail = {
        n.replace(f"blk.{before}.", f"blk.{last}."): s for n, s in shapes.items() if f"blk.{before}." in n
    }
    return shapes | tail | {"output_norm.weight": (config.hidden_size,)}


def qwen3_metadata(config: TextEncoderConfig) -> list[tuple[str, object]]:
    """llama.cpp's keys and the real Qwen vocabulary."""
    keys: dict[str, object] = {
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
    vocabulary = qwen_vocabulary.gguf_metadata().items()
    return [(f"qwen3.{k}", v) for k, v in keys.items()] + [(k, v) for k, v in vocabulary if "tokenizer" in k]


def main() -> None:
    """Write the three files; a file that exists is kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=30, help="blocks of the transformer")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    transformer, encoder = TransformerConfig(n_layers=args.layers), TextEncoderConfig()
    jobs: dict[str, Callable[[Path], None]] = {
        "transformer.gguf": lambda p: write_gguf(
            p,
            "lumina2",
            names.checkpoint_shapes(names.transformer_table(transformer, "fused")),
            transformer_type,
        ),
        "text_encoder.gguf": lambda p: write_gguf(
            p, "qwen3", qwen3_shapes(encoder), text_encoder_type, qwen3_metadata(encoder)
        ),
        "vae.safetensors": write_vae,
    }
    for name, write in jobs.items():
        if not (args.folder / name).exists():
            write(args.folder / name)
            print(f"{name}: {(args.folder / name).stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
