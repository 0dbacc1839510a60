"""Write the trained nano model as the files that ship with the package.

    python -m benchmarks.nano.export --runs RUNS [--to zimage_core/assets/nano]

transformer.gguf and text_encoder.gguf hold Q8_0 where rows are whole blocks of 32, F16 for the other
matrices (w2, whose rows are 682 long) and F32 for vectors; vae.safetensors is F16; words.json has the words
of the prompts. Sizes are printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.nano.draw import SIZE, words
from benchmarks.nano.model import TRANSFORMER, encoder_config
from benchmarks.nano.train_vae import CONFIG, LATENT_NOISE
from benchmarks.nano.vocabulary import PLAIN, SPECIAL, VISION, tokenizer
from zimage_core.weights.names import Table, autoencoder_table, sources, text_encoder_table, transformer_table

ASSETS = Path(__file__).parents[2] / "zimage_core" / "assets" / "nano"
SMALLER = ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight")
"""Matrices in Q5_1, to stay under 12 MB in all; chosen because the images change least."""
DEFAULT_SIZE_KEY = "zimage.sample_size"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Values of tokenizer.ggml.token_type."""


def ema(path: Path, prefix: str) -> dict[str, Tensor]:
    """Averaged float32 weights of one network in a checkpoint, without the prefix."""
    state = torch.load(path, weights_only=True)["ema"]
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}


def gather(table: Table, weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Checkpoint name -> float32 array; fused tensors are stacked in row order."""
    return {
        name: torch.cat([weights[e.module].reshape(e.shape) for e in parts]).contiguous().numpy()
        for name, parts in sources(table).items()
    }


def finish(writer: GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
    """Write the file with its tensors."""
    for name, values in tensors.items():
        if values.ndim == 1 or values.shape[0] == 1:
            writer.add_tensor(name, values)
        elif values.shape[-1] % 32 == 0:
            kind = GGMLQuantizationType.Q5_1 if name in SMALLER else GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe_file(writer: GGUFWriter, name: str) -> None:
    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_description("Toy Z-Image trained from scratch on procedural drawings (benchmarks/nano)")
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(2)


def export_transformer(runs: Path, path: Path) -> None:
    writer = GGUFWriter(path, "lumina2")
    describe_file(writer, "Nano Z-Image")
    writer.add_uint32(DEFAULT_SIZE_KEY, SIZE)
    table = transformer_table(TRANSFORMER, "fused")
    finish(writer, gather(table, ema(runs / "nano.pt", "transformer.")))


def export_text_encoder(runs: Path, path: Path) -> None:
    config = encoder_config()
    writer = GGUFWriter(path, config.arch)
    describe_file(writer, "Nano Z-Image text encoder")
    writer.add_block_count(config.num_layers)  # the last one is never run and not in the file
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    words = tokenizer()
    names = [words.id_to_token(i) for i in range(words.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types(
        [CONTROL if t in SPECIAL + VISION else USER_DEFINED if t in PLAIN else NORMAL for t in names]
    )
    merges = json.loads(words.to_str())["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(names.index(SPECIAL[0]))
    writer.add_eos_token_id(names.index(SPECIAL[2]))
    writer.add_pad_token_id(names.index(SPECIAL[0]))
    writer.add_add_bos_token(False)
    finish(writer, gather(text_encoder_table(config, "gguf"), ema(runs / "nano.pt", "text_encoder.")))


def export_vae(runs: Path, path: Path) -> None:
    source = runs / "decoder.pt" if (runs / "decoder.pt").exists() else runs / "vae.pt"
    weights, norm = ema(source, "model."), ema(source, "norm.")
    std, mean = (norm["running_var"] + 1e-5).sqrt(), norm["running_mean"]
    # (z - mean) / std for the training's unit-variance latents, then Flux's scale and shift undone
    scale = 1 / (std * CONFIG.scaling_factor)
    w, b = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
    n = CONFIG.latent_channels
    w[:n] *= scale[:, None, None, None]
    b[:n] = (b[:n] - mean) * scale + CONFIG.shift_factor
    w[n:], b[n:] = 0, 2 * np.log(LATENT_NOISE / CONFIG.scaling_factor)  # the noise it was trained with
    tensors = {
        name: torch.cat([weights[e.module].reshape(e.shape) for e in parts]).half().contiguous()
        for name, parts in sources(autoencoder_table(CONFIG, "bfl")).items()
    }
    metadata = {"zimage.norm_num_groups": str(CONFIG.norm_num_groups), "license": "apache-2.0"}
    save_file(tensors, path, metadata=metadata)


def export_words(path: Path) -> None:
    lines = (f'  "{kind}": {json.dumps(found, ensure_ascii=False)}' for kind, found in words().items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    export_transformer(args.runs, args.to / "transformer.gguf")
    export_text_encoder(args.runs, args.to / "text_encoder.gguf")
    export_vae(args.runs, args.to / "vae.safetensors")
    export_words(args.to / "words.json")
    for file in sorted(args.to.iterdir()):
        print(f"{file.name:24} {file.stat().st_size:>10,} bytes")


if __name__ == "__main__":
    main()
