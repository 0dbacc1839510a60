"""Tiny random networks made by diffusers and transformers beside ours, and how far the two are apart.

Used by tests/parity (which asserts) and benchmarks/parity.py (which writes the table of docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer

CAPTION_LENGTHS = (1, 5, 32, 70)
SIDES = {"15 tokens, 17 pads": (6, 10), "32 tokens, no pads": (8, 16), "48 tokens, 16 pads": (12, 16)}
"""Latent sides (h, w); two latents a token."""

TRANSFORMER: dict[str, Any] = {
    "in_channels": 16, "dim": 48, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3,
    "cap_feat_dim": 20, "axes_dims": [4, 6, 6],
    "axes_lens": [256, 64, 64], "rope_theta": 256.0, "t_scale": 1000.0,
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of one comparison."""

    component: str
    case: str
    place: str
    error: float


def randomise(module: nn.Module, std: float, seed: int = 0) -> None:
    """Normal weights; norms around one, so that every block does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (1.0 if "norm" in name else 0.0))


def transformer_pair(std: float = 0.06) -> tuple[Any, ZImageTransformer]:
    """diffusers' transformer and ours with the same weights."""
    from diffusers import ZImageTransformer2DModel

    theirs = ZImageTransformer2DModel(**TRANSFORMER).eval()
    randomise(theirs, std)
    ours = ZImageTransformer(TransformerConfig.from_json(TRANSFORMER)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def transformer_inputs(
    sides: list[tuple[int, int]], captions: list[int]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Random latents, times and captions of the given sizes."""
    g = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, 1, h, w, generator=g) for h, w in sides]
    features = [torch.randn(n, TRANSFORMER["cap_feat_dim"], generator=g) for n in captions]
    return latents, torch.tensor([0.137, 0.625])[: len(sides)], features


def transformer_cases() -> Iterator[tuple[str, list[tuple[int, int]], list[int]]]:
    """Caption lengths x token counts for one picture, then mixed pairs."""
    for caption in CAPTION_LENGTHS:
        for name, side in SIDES.items():
            yield f"caption {caption}, {name}", [side], [caption]
    a, b, c = SIDES.values()
    for sides, captions in (([a, c], [5, 70]), ([b, a], [32, 1]), ([b, b], [70, 5]), ([a, a], [5, 5])):
        yield f"batch of 2: captions {captions}, latents {sides}", sides, captions


BLOCKS = (
    [f"noise_refiner.{i}" for i in range(2)]
    + [f"context_refiner.{i}" for i in range(2)]
    + [f"layers.{i}" for i in range(3)]
)


def record(model: nn.Module, names: list[str]) -> dict[str, list[Tensor]]:
    """Outputs of the named submodules, filled at each forward."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out))
    return seen


@torch.no_grad()
def transformer_differences(sides: list[tuple[int, int]], captions: list[int], case: str) -> list[Difference]:
    """Every block's output and the final one, cut to each picture's own tokens."""
    theirs, ours = transformer_pair()
    want_blocks, got_blocks = record(theirs, BLOCKS), record(ours, BLOCKS)
    x, t, caps = transformer_inputs(sides, captions)
    want = theirs([v.clone() for v in x], t, [c.clone() for c in caps], return_dict=False)[0]
    got = ours(x, t, caps)
    out = []
    for name in BLOCKS:
        error = 0.0
        for i in range(len(sides)):
            mine = got_blocks[name][i]
            error = max(error, float((want_blocks[name][0][i, : len(mine)] - mine).abs().max()))
        out.append(Difference("transformer", case, name, error))
    final = max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True))
    return [*out, Difference("transformer", case, "output", final)]


ENCODERS = {
    "qwen3": ("Qwen3Config", "Qwen3Model"),
    "qwen2": ("Qwen2Config", "Qwen2Model"),
    "llama": ("LlamaConfig", "LlamaModel"),
}


@torch.no_grad()
def text_encoder_difference(arch: str, length: int) -> Difference:
    """Against `hidden_states[-2]` of transformers."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in ENCODERS[arch])
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    if arch == "qwen3":
        sizes["head_dim"] = 16  # heads * head_dim is not hidden_size, as in Qwen3-4B
    config = config_class(**sizes)
    theirs = model_class(config).eval()
    randomise(theirs, 0.08)
    ours = TextEncoder(TextEncoderConfig.from_json(config.to_dict())).eval()
    keys = ours.load_state_dict(theirs.state_dict(), strict=False)
    if keys.missing_keys or not all(k.startswith(("layers.3.", "norm.")) for k in keys.unexpected_keys):
        raise AssertionError(keys)
    ids = torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(2))
    want = theirs(ids[None], output_hidden_states=True).hidden_states[-2][0]
    return Difference(
        "text encoder", f"{arch}, {length} tokens", "hidden_states[-2]", float((want - ours(ids)).abs().max())
    )


SMALL_VAE = AutoencoderConfig(block_out_channels=(16, 16, 32, 48), layers_per_block=2, norm_num_groups=8)
"""Four widths, a shortcut in two of them."""


def autoencoder_pair(config: AutoencoderConfig = SMALL_VAE, std: float = 0.05) -> tuple[Any, Autoencoder]:
    """diffusers' AutoencoderKL and ours with the same weights."""
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    randomise(theirs, std)
    ours = Autoencoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@torch.no_grad()
def autoencoder_differences(height: int, width: int) -> list[Difference]:
    """Encode (mean and log-variance) and decode."""
    theirs, ours = autoencoder_pair()
    g = torch.Generator().manual_seed(3)
    picture, z = (
        torch.rand(2, 3, height, width, generator=g) * 2 - 1,
        torch.randn(2, 16, height // 8, width // 8, generator=g),
    )
    posterior, (mean, logvar) = theirs.encode(picture).latent_dist, ours.moments(picture)
    pairs = {
        "encode mean": (posterior.mean, mean),
        "encode log-variance": (posterior.logvar, logvar),
        "decode": (theirs.decode(z).sample, ours.decode(z)),
    }
    return [
        Difference("VAE", f"{width} x {height} px", k, float((a - b).abs().max()))
        for k, (a, b) in pairs.items()
    ]
