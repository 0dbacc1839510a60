"""A whole Z-Image of random weights, small enough to make an image in milliseconds.

Same architectures and conventions as the real one; a fresh one comes in memory (`pipeline`) or as a diffusers
folder (`folder`), equal to the bit for equal seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.byte_pairs import byte_alphabet
from zimage_core.text.tokenizer import Tokenizer

SIZE = 32
"""Pixels a side in most tests: 4 image tokens."""

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<|vision_start|>", "<|vision_end|>"),
)
TRANSFORMER: dict[str, Any] = {
    "_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1],
    "in_channels": 16, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "qk_norm": True, "cap_feat_dim": 24, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [4, 6, 6],
    "axes_lens": [1536, 512, 512],
}  # fmt: skip
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["Qwen3Model"], "model_type": "qwen3", "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32,
    "vocab_size": 272, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 4, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


def _randomised(module: nn.Module, seed: int, std: float) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + ("norm" in name))
    return module.requires_grad_(False).eval()


def transformer(seed: int = 0) -> ZImageTransformer:
    return _randomised(ZImageTransformer(TransformerConfig.from_json(TRANSFORMER)), seed, 0.15)


def text_encoder(seed: int = 1) -> TextEncoder:
    return _randomised(TextEncoder(TextEncoderConfig.from_json(TEXT_ENCODER)), seed, 0.2)


def vae(seed: int = 2) -> Autoencoder:
    return _randomised(Autoencoder(AutoencoderConfig.from_json(VAE)), seed, 0.15)


def vocabulary() -> list[str]:
    """The 256 bytes as characters, then the special tokens."""
    return [*byte_alphabet(), *SPECIALS]


def tokenizer(without: tuple[str, ...] = ()) -> Tokenizer:
    tokens = [token for token in vocabulary() if token not in without]
    types = [1] * 256 + [3] * (len(tokens) - 256)
    return Tokenizer.from_metadata({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [],
    })  # fmt: skip


def pipeline(shift: float = 3.0, dtype: torch.dtype = torch.float32) -> ZImagePipeline:
    """A new pipeline in memory."""
    return ZImagePipeline(
        scheduler=FlowMatchEulerScheduler(shift),
        vae=vae(),
        text_encoder=text_encoder().to(dtype),
        tokenizer=tokenizer(),
        transformer=transformer().to(dtype),
        sample_size=SIZE,
    )


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), "utf-8")


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = vocabulary()
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens[:256])})
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    decoder = {
        str(i): {"content": token, "lstrip": False, "rstrip": False, "normalized": False,
                 "single_word": False, "special": not token.endswith("think>")}
        for i, token in enumerate(tokens) if i >= 256
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})


def folder(where: Path, shift: float = 3.0) -> Path:
    """The pipeline of the same seeds as a diffusers folder."""
    parts = {
        "transformer": (transformer().state_dict(), TRANSFORMER, "diffusion_pytorch_model.safetensors"),
        "text_encoder": (text_encoder_state(), TEXT_ENCODER, "model.safetensors"),
        "vae": (vae().state_dict(), VAE, "diffusion_pytorch_model.safetensors"),
    }
    for name, (state, config, file) in parts.items():
        (where / name).mkdir(parents=True)
        save_file(
            {k: v.contiguous() for k, v in state.items()}, where / name / file, metadata={"format": "pt"}
        )
        write_json(where / name / "config.json", config)
    write_tokenizer(where / "tokenizer")
    (where / "scheduler").mkdir()
    write_json(
        where / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift,
         "use_dynamic_shifting": False},
    )  # fmt: skip
    write_json(where / "model_index.json", {"_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0"})
    return where


def text_encoder_state() -> dict[str, torch.Tensor]:
    """With the last layer and final norm that files have and nobody runs."""
    state = dict(text_encoder().state_dict())
    last = TEXT_ENCODER["num_hidden_layers"] - 1
    for name, value in list(state.items()):
        if name.startswith("layers.0."):
            state[name.replace("layers.0.", f"layers.{last}.")] = torch.full_like(value, 0.5)
    state["norm.weight"] = torch.ones(TEXT_ENCODER["hidden_size"])
    return {f"model.{name}": value for name, value in state.items()}
