"""Tiny random networks made by diffusers and transformers beside ours, and how far the two are apart.

Used by tests/parity (which asserts) and benchmarks/parity.py (which writes the table of
docs/explanation/numerics.md). Every comparison runs twice: in float64, where a difference is a difference of
formulas, and in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.parity.precision import FLOAT32, NARROW, WIDE, in_float64

CAPTION_LENGTHS = (1, 5, 32, 70)
SIDES = {"15 tokens, 17 pads": (6, 10), "32 tokens, no pads": (8, 16), "48 tokens, 16 pads": (12, 16)}
"""Latent sides (h, w); two latents a token."""

TRANSFORMER: dict[str, Any] = {
    "in_channels": 16, "dim": 48, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3,
    "cap_feat_dim": 20, "axes_dims": [4, 6, 6],
    "axes_lens": [256, 64, 64], "rope_theta": 256.0, "t_scale": 1000.0,
}  # fmt: skip


def widen(module: nn.Module) -> None:
    """Turn a network of theirs or ours that was read from a file, and is in float32, into one in float64."""
    module.double()
    with in_float64():
        for part in module.modules():
            if getattr(part, "rotary_emb", None) is not None:  # frequencies, computed when it was made
                part.rotary_emb = type(part.rotary_emb)(part.config)


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences of one output: theirs to ours, and what float32 moves theirs."""

    component: str
    case: str
    place: str
    float64: float
    float32: float
    theirs: float
    """Of their float32 result from their float64 result."""

    @property
    def passes(self) -> bool:
        """Whether both differences are rounding."""
        return self.float64 <= WIDE and self.float32 <= NARROW * self.theirs


Outputs = Mapping[str, tuple[Any, Any]]
"""Theirs and ours by the name of the place."""


def compare(component: str, case: str, run: Callable[[], Outputs]) -> list[Difference]:
    """Run in float32 and in float64; `run` makes networks and inputs anew."""
    narrow = run()
    with in_float64():
        wide = run()
    return [
        Difference(
            component, case, place, apart(*wide[place]), apart(theirs, ours), apart(theirs, wide[place][0])
        )
        for place, (theirs, ours) in narrow.items()
    ]


def apart(a: Any, b: Any) -> float:
    """Largest absolute difference of two tensors or arrays of one shape.

    Raises:
        ValueError: The shapes differ.
    """
    a, b = (torch.as_tensor(x).to(torch.float64) for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a - b).abs().max())


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers, the same in both precisions."""
    return torch.randn(shape, generator=generator, dtype=FLOAT32).to(torch.get_default_dtype())


def randomise(module: nn.Module, std: float, seed: int = 0) -> None:
    """Normal weights; norms around one, so that every block does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            values = torch.randn(p.shape, generator=generator, dtype=FLOAT32) * std
            p.copy_(values + (1.0 if "norm" in name else 0.0))


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
    latents = [drawn(g, 16, 1, h, w) for h, w in sides]
    features = [drawn(g, n, TRANSFORMER["cap_feat_dim"]) for n in captions]
    times = torch.tensor([0.137, 0.625], dtype=FLOAT32).to(torch.get_default_dtype())
    return latents, times[: len(sides)], features


def transformer_cases() -> Iterator[tuple[str, list[tuple[int, int]], list[int]]]:
    """Caption lengths x token counts for one image, then mixed pairs."""
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


def transformer_differences(sides: list[tuple[int, int]], captions: list[int], case: str) -> list[Difference]:
    """Every block's output and the final one, cut to each image's own tokens."""

    @torch.no_grad()
    def run() -> Outputs:
        theirs, ours = transformer_pair()
        want_blocks, got_blocks = record(theirs, BLOCKS), record(ours, BLOCKS)
        x, t, caps = transformer_inputs(sides, captions)
        want = theirs([v.clone() for v in x], t, [c.clone() for c in caps], return_dict=False)[0]
        got = ours(x, t, caps)
        pairs = {}
        for name in BLOCKS:
            mine = got_blocks[name]
            their = [want_blocks[name][0][i, : len(part)] for i, part in enumerate(mine)]
            pairs[name] = (torch.cat(their), torch.cat(mine))
        return {**pairs, "output": (_flat(want), _flat(got))}

    return compare("transformer", case, run)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


ENCODERS = {
    "qwen3": ("Qwen3Config", "Qwen3Model"),
    "qwen2": ("Qwen2Config", "Qwen2Model"),
    "llama": ("LlamaConfig", "LlamaModel"),
}


def text_encoder_difference(arch: str, length: int) -> Difference:
    """Against `hidden_states[-2]` of transformers."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in ENCODERS[arch])
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    if arch == "qwen3":
        sizes["head_dim"] = 16  # heads * head_dim is not hidden_size, as in Qwen3-4B
    config = config_class(**sizes)
    ids = torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def run() -> Outputs:
        theirs = model_class(config).eval()
        randomise(theirs, 0.08)
        ours = TextEncoder(TextEncoderConfig.from_json(config.to_dict())).eval()
        keys = ours.load_state_dict(theirs.state_dict(), strict=False)
        if keys.missing_keys or not all(k.startswith(("layers.3.", "norm.")) for k in keys.unexpected_keys):
            raise AssertionError(keys)
        want = theirs(ids[None], output_hidden_states=True).hidden_states[-2][0]
        return {"hidden_states[-2]": (want, ours(ids))}

    (found,) = compare("text encoder", f"{arch}, {length} tokens", run)
    return found


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


def autoencoder_differences(height: int, width: int) -> list[Difference]:
    """Encode (mean and log-variance) and decode."""

    @torch.no_grad()
    def run() -> Outputs:
        theirs, ours = autoencoder_pair()
        g = torch.Generator().manual_seed(3)
        image = (
            torch.rand(2, 3, height, width, generator=g, dtype=FLOAT32).to(torch.get_default_dtype()) * 2 - 1
        )
        z = drawn(g, 2, 16, height // 8, width // 8)
        posterior, (mean, logvar) = theirs.encode(image).latent_dist, ours.moments(image)
        return {
            "encode mean": (posterior.mean, mean),
            "encode log-variance": (posterior.logvar, logvar),
            "decode": (theirs.decode(z).sample, ours.decode(z)),
        }

    return compare("VAE", f"{width} x {height} px", run)
