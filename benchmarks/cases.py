"""What is worth timing: every shape here follows from the configuration of the networks, none is typed.

An image of `pixels` a side and a caption of `caption` tokens give the rows; both are filled up to whole
multiples of 32, as the transformer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.models.sequence import pad_count
from zimage_core.models.timestep import FREQUENCIES

TRANSFORMER = TransformerConfig()
ENCODER = TextEncoderConfig()
PIXELS, CAPTION = 1024, 32
"""The image and the caption of the standing figures."""


@dataclass(frozen=True)
class LinearCase:
    """y [M, N] = x [M, K] W^T, `count` times a step."""

    name: str
    n: int
    k: int
    m: int
    count: int = 1

    @property
    def weights(self) -> int:
        """Weights of all `count` matrices."""
        return self.n * self.k * self.count

    @property
    def flops(self) -> float:
        """Operations of one product."""
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True)
class ElementwiseCase:
    """One of the fused element-wise steps over `rows` rows of `size` numbers a head, `count` times a step."""

    name: str
    rows: int
    size: int
    heads: int = 1
    count: int = 1

    @property
    def numbers(self) -> int:
        """Numbers of one of its arrays; of q and k together for `qk_norm_rope`."""
        return self.rows * self.size * self.heads * (2 if self.name == "qk_norm_rope" else 1)

    def nbytes(self, itemsize: int) -> int:
        """Every input read once and every result written once; vectors are left out."""
        numbers = self.rows * self.size * self.heads
        angles = self.rows * self.size * 4 if self.name == "qk_norm_rope" else 0  # float32 cosines and sines
        return numbers * itemsize * STREAMS[self.name] + angles


STREAMS = {"rms_norm_modulate": 2, "qk_norm_rope": 4, "gate_norm_residual": 3, "silu_gate": 3}
"""Arrays of the size of the activations that each step reads and writes."""


@dataclass(frozen=True)
class AttentionCase:
    """Unmasked attention over `length` tokens, `count` times a step."""

    name: str
    length: int
    heads: int
    head_dim: int
    count: int = 1

    @property
    def flops(self) -> float:
        """Operations of one call: two products for each head, [L, D] [D, L] and [L, L] [L, D]."""
        return 4.0 * self.length**2 * self.heads * self.head_dim

    def nbytes(self, itemsize: int) -> int:
        """q, k and v read, the result written."""
        return 4 * self.length * self.heads * self.head_dim * itemsize


def padded(tokens: int) -> int:
    """Tokens with the pads behind them."""
    return tokens + pad_count(tokens)


def image_rows(pixels: int = PIXELS, config: TransformerConfig = TRANSFORMER) -> int:
    """Tokens of a square image, pads included."""
    side = pixels // (AutoencoderConfig().spatial_factor * config.patch_size)
    return padded(side * side)


def stages(
    pixels: int = PIXELS, caption: int = CAPTION, config: TransformerConfig = TRANSFORMER
) -> tuple[tuple[str, int, int], ...]:
    """(name, rows of a pass, blocks) of the three stacks of blocks."""
    image, text = image_rows(pixels, config), padded(caption)
    refiners = config.n_refiner_layers
    return (
        ("layers", image + text, config.n_layers),
        ("noise_refiner", image, refiners),
        ("context_refiner", text, refiners),
    )


def block_linears(
    pixels: int = PIXELS, caption: int = CAPTION, config: TransformerConfig = TRANSFORMER
) -> list[LinearCase]:
    """The large matrices of all blocks."""
    dim, hidden = config.dim, config.hidden_dim
    found = []
    for stage, rows, blocks in stages(pixels, caption, config):
        found += [
            LinearCase(f"{stage}.qkvo", dim, dim, rows, 4 * blocks),
            LinearCase(f"{stage}.w13", hidden, dim, rows, 2 * blocks),
            LinearCase(f"{stage}.w2", dim, hidden, rows, blocks),
        ]
    return found


def small_linears(
    pixels: int = PIXELS, caption: int = CAPTION, config: TransformerConfig = TRANSFORMER
) -> list[LinearCase]:
    """What a step multiplies besides: modulation, embedders, the last projection."""
    dim, adaln, patch = config.dim, config.adaln_dim, config.patch_dim
    image, text = image_rows(pixels, config), padded(caption)
    return [
        LinearCase("adaLN", 4 * dim, adaln, 1, config.n_layers + config.n_refiner_layers),
        LinearCase("t_embedder.0", config.t_mid_dim, FREQUENCIES, 1),
        LinearCase("t_embedder.2", adaln, config.t_mid_dim, 1),
        LinearCase("x_embedder", dim, patch, image),
        LinearCase("cap_embedder", dim, config.cap_feat_dim, text),
        LinearCase("final.adaLN", dim, adaln, 1),
        LinearCase("final.linear", patch, dim, image),
    ]


def encoder_linears(tokens: int = CAPTION, config: TextEncoderConfig = ENCODER) -> list[LinearCase]:
    """The matrices of the text encoder's layers; the last layer is never run."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers - 1
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [
        LinearCase("encoder.q", query, width, tokens, layers),
        LinearCase("encoder.kv", key, width, tokens, 2 * layers),
        LinearCase("encoder.o", width, query, tokens, layers),
        LinearCase("encoder.gate_up", inner, width, tokens, 2 * layers),
        LinearCase("encoder.down", width, inner, tokens, layers),
    ]


def shapes(config: TransformerConfig = TRANSFORMER) -> dict[str, tuple[int, int]]:
    """(N, K) of every large matrix by a short name: those of a block first, the largest at the head."""
    block = [c for c in block_linears(config=config) if c.name.startswith("layers.")]
    named = {c.name.removeprefix("layers."): (c.n, c.k) for c in sorted(block, key=lambda c: -c.n)}
    others = [*small_linears(config=config), *encoder_linears()]
    return named | {c.name: (c.n, c.k) for c in others if c.n * c.k >= config.dim * config.adaln_dim}


def attention(
    pixels: int = PIXELS, caption: int = CAPTION, config: TransformerConfig = TRANSFORMER
) -> list[AttentionCase]:
    """One case for each stack of blocks."""
    return [
        AttentionCase(stage, rows, config.n_heads, config.head_dim, blocks)
        for stage, rows, blocks in stages(pixels, caption, config)
    ]


def elementwise(rows: int, config: TransformerConfig = TRANSFORMER) -> list[ElementwiseCase]:
    """The four fused steps over `rows` rows."""
    return [
        ElementwiseCase("rms_norm_modulate", rows, config.dim),
        ElementwiseCase("qk_norm_rope", rows, config.head_dim, config.n_heads),
        ElementwiseCase("silu_gate", rows, config.hidden_dim),
        ElementwiseCase("gate_norm_residual", rows, config.dim),
    ]


STEP = ("layers", "noise_refiner")
"""The stacks of blocks that run in every step. The context refiner and all modulations are computed once in a
run, by `ZImageTransformer.prepare`."""


def step_linears(
    pixels: int = PIXELS, caption: int = CAPTION, config: TransformerConfig = TRANSFORMER
) -> list[LinearCase]:
    """The matrices of `ZImageTransformer.predict`."""
    blocks, ends = block_linears(pixels, caption, config), small_linears(pixels, caption, config)
    return [case for case in blocks if case.name.partition(".")[0] in STEP] + [
        case for case in ends if case.name in ("x_embedder", "final.linear")
    ]


def step_attention(
    pixels: int = PIXELS, caption: int = CAPTION, config: TransformerConfig = TRANSFORMER
) -> list[AttentionCase]:
    """The attentions of `ZImageTransformer.predict`."""
    return [case for case in attention(pixels, caption, config) if case.name in STEP]


def step_elementwise(
    pixels: int = PIXELS, caption: int = CAPTION, config: TransformerConfig = TRANSFORMER
) -> list[ElementwiseCase]:
    """The fused element-wise steps of `ZImageTransformer.predict`."""
    return [
        replace(case, count=blocks * (2 if case.name in ("rms_norm_modulate", "gate_norm_residual") else 1))
        for stage, rows, blocks in stages(pixels, caption, config)
        if stage in STEP
        for case in elementwise(rows, config)
    ]


def teraflops(found: Sequence[LinearCase | AttentionCase]) -> float:
    """TFLOP of one step."""
    return sum(case.flops * case.count for case in found) / 1e12
