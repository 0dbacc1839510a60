"""The one call of scaled_dot_product_attention."""

from __future__ import annotations

from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for each head.

    Never masked but for `causal`: a sequence holds the tokens of one picture only, and its pad
    tokens take part by design.

    Shape:
        q [..., L, H, D]; k, v [..., L, H_kv, D] with H a multiple of H_kv -> [..., L, H * D].
    """
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    grouped = q.shape[-3] != k.shape[-3]
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return out.transpose(-3, -2).flatten(-2)
