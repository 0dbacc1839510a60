"""Qwen3 up to the hidden state that the transformer reads; also serves qwen2 and llama checkpoints.

The caption is transformers' `hidden_states[-2]`: the residual stream after the last layer but one,
without the final norm. The last layer and that norm are therefore never built, read or run.
Parameter names are those of transformers, without the prefix `model.`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zimage_core.config import TextEncoderConfig
from zimage_core.errors import BadShape
from zimage_core.models.block_source import RESIDENT, BlockSource
from zimage_core.models.kv_cache import KVCache, LayerCache
from zimage_core.models.ported import Network
from zimage_core.nn.attention import attention
from zimage_core.nn.layers import RMSNorm, Rotation, for_halves, rotate_half, rotation
from zimage_core.nn.linear import Embedding, Linear, ready

FP16_SCALE = 2.0**-7
"""Factor by which float16 inputs of o_proj and down_proj are scaled down; undone in float32.

Single channels in the residual stream of a language model reach 1e4 and more. With float16 the residual is
float32, so that a branch of 1e6 is added without overflow.
"""


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        d, hidden = config.head_dim, config.hidden_size
        bias = config.attention_bias
        self.head_dim = d
        self.q_proj = Linear(hidden, config.num_heads * d, bias=bias)
        self.k_proj = Linear(hidden, config.num_kv_heads * d, bias=bias)
        self.v_proj = Linear(hidden, config.num_kv_heads * d, bias=bias)
        self.o_proj = Linear(config.num_heads * d, hidden)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Rotation, scale: float, cache: LayerCache | None = None) -> Tensor:
        """x [..., L, hidden] -> [..., L, hidden], multiplied by `scale`.

        With a cache x is [L, hidden]: the first tokens of a text, or one that follows those in the cache.
        """
        per_head = (-1, self.head_dim)
        x = ready(x, self.q_proj, self.k_proj, self.v_proj)
        q, k = self.q_proj(x).unflatten(-1, per_head), self.k_proj(x).unflatten(-1, per_head)
        v = self.v_proj(x).unflatten(-1, per_head)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_half(q, rope), rotate_half(k, rope)
        if cache is not None:
            k, v = cache.extend(k, v)
        alone = cache is not None and q.shape[-3] == 1
        mixed = _of_one(q, k, v) if alone else attention(q, k, v, causal=True)
        out: Tensor = self.o_proj(mixed if scale == 1.0 else mixed * scale)
        return out


def _of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one token, q [1, H, D], to k and v [L, H_kv, D] -> [1, H * D].

    The query heads that share a key head are its rows, so that neither keys nor values are repeated.
    """
    rows = q.view(k.shape[-2], -1, q.shape[-1]).transpose(0, 1)
    mixed = attention(rows, k, v).view(rows.shape)
    return mixed.transpose(0, 1).reshape(1, -1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        """x [..., L, hidden] -> [..., L, hidden], multiplied by `scale`."""
        x = ready(x, self.gate_proj, self.up_proj)
        up = self.up_proj(x if scale == 1.0 else x * scale)
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * up)
        return out


class Layer(nn.Module):
    """Pre-norm attention and MLP on a residual stream."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: Rotation, dtype: torch.dtype, cache: LayerCache | None = None
    ) -> Tensor:
        """x [..., L, hidden] -> [..., L, hidden] in x's dtype; the branches compute in `dtype`."""
        scale = FP16_SCALE if dtype == torch.float16 else 1.0
        branch = self.self_attn(self.input_layernorm(x).to(dtype), rope, scale, cache)
        x = x + _unscaled(branch, x.dtype, scale)
        branch = self.mlp(self.post_attention_layernorm(x).to(dtype), scale)
        return x + _unscaled(branch, x.dtype, scale)


def _unscaled(branch: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    branch = branch.to(dtype)
    return branch if scale == 1.0 else branch / scale


class TextEncoder(Network):
    """Token ids to caption features."""

    loader = "load_text_encoder"
    few_rows = True
    """A prompt has tens of tokens: making int8 rows takes longer than their products save."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers - 1))
        self.stream: BlockSource = RESIDENT

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """The layers in their order."""
        return tuple(self.layers)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation; the packed weights do not depend on it."""
        weight: Tensor = self.layers[0].input_layernorm.weight  # type: ignore[union-attr,assignment]
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        weight: Tensor = self.layers[0].input_layernorm.weight  # type: ignore[union-attr,assignment]
        return weight.device

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids [L] -> hidden states [L, hidden_size]; float32 when the model is float16.

        Args:
            ids: Token ids, all of a text, or with a cache those that follow the ones it has: one at a time
                after the first.
            cache: Keys and values of the tokens so far, which are added to; for `models.language_model`.

        Raises:
            BadShape: ids is not one row of at least one token.
            BadArgument: An id is outside the vocabulary.
        """
        if ids.ndim != 1 or len(ids) == 0:
            raise BadShape(f"text encoder: got ids of shape {tuple(ids.shape)}, wanted [L] with L >= 1")
        stream = torch.float32 if self.dtype == torch.float16 else self.dtype
        # the table may stay on the host while the layers are on a GPU: only a few rows are read
        x: Tensor = self.embed_tokens(ids.to(self.embed_tokens.device)).to(self.device, stream)
        rope = self.rotation(len(ids), 0 if cache is None else cache.length)
        for i, layer in enumerate(self.layers):
            with self.stream.block(i):
                x = layer(x, rope, self.dtype, None if cache is None else cache.layers[i])
        return x

    def rotation(self, length: int, start: int = 0) -> Rotation:
        """Angles of positions start .. start + length - 1, as `rotate_half` takes them."""
        positions = torch.arange(start, start + length).unsqueeze(1)
        cos, sin = for_halves(rotation(positions, (self.config.head_dim,), self.config.rope_theta))
        return cos.to(self.device), sin.to(self.device)
