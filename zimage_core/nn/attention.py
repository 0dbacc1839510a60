"""The one call of scaled_dot_product_attention."""

from __future__ import annotations

from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for each head.

    There is no mask but `causal`: a sequence holds the tokens of one image only, and its pad
    tokens take part by design.

    Shape:
        q [..., L, H, D]; k, v [..., L, H_kv, D] with H a multiple of H_kv -> [..., L, H * D].
    """
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    alone = q.ndim == 3
    if alone:  # torch's fused kernels take four axes only; of three it would build the whole matrix of scores
        q, k, v = q[None], k[None], v[None]
    grouped = q.shape[-3] != k.shape[-3]
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    out = out.transpose(-3, -2).flatten(-2)
    return out[0] if alone else out
