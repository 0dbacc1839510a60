"""Attention on a CPU with q k^T in int8 and the product with v in bfloat16, for `compute="int8"`.

torch's own attention on a CPU reaches the rate of its float32 product, and no more in bfloat16. Here each of
the two products runs at the rate of its type (benchmarks/results/attention_cpu.json).
`reference.attention_int8` specifies the scores; the keys are smoothed as in SageAttention (arXiv 2410.02367).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.capability import bfloat16_pays, int8_pays
from zimage_core.cpu.int8 import multiply_into, quantize_into
from zimage_core.cpu.pool import in_parallel
from zimage_core.cpu.workspace import workspace

QUERIES = 256
"""Queries whose scores exist at a time: 2 MiB of scores for 1,056 tokens."""
SHORTEST = 512
"""Tokens from which on it is faster than torch's attention; at 288 it is not."""


def pays(tokens: int) -> bool:
    """Whether `attention` is faster here than torch's own."""
    return tokens >= SHORTEST and int8_pays() and bfloat16_pays()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for each head, without mask.

    Args:
        q: [H, L, D], a float type, any strides.
        k: [H, L, D].
        v: [H, L, D].

    Returns:
        [H, L, D] in q's dtype.
    """
    heads, tokens, channels = q.shape
    out = torch.empty(tokens, heads, channels, dtype=q.dtype).transpose(0, 1)  # as the next layer reads it

    def share(first: int, last: int) -> None:
        for head in range(first, last):
            _head(out[head], q[head], k[head], v[head])

    in_parallel(share, heads, multiple=1)
    return out


def _head(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """One head: q, k, v [L, D] -> out [L, D]."""
    tokens, channels = q.shape
    work = workspace("attention", q.device)
    work.release()
    q_rows, k_rows = (work.take(torch.int8, tokens, channels) for _ in range(2))
    q_scale, k_scale = (work.take(torch.float32, tokens) for _ in range(2))
    smooth = work.take(torch.float32, tokens, channels).copy_(k)
    smooth.sub_(smooth.mean(0))
    quantize_into(k_rows, k_scale, smooth, 0)
    quantize_into(q_rows, q_scale, q, 0)
    q_scale.mul_(channels**-0.5)
    values = work.take(torch.bfloat16, tokens, channels).copy_(v)
    mark = work.mark
    for start in range(0, tokens, QUERIES):
        part = slice(start, min(start + QUERIES, tokens))
        count = part.stop - start
        work.release(mark)
        sums, weights = (work.take(kind, count, tokens) for kind in (torch.int32, torch.float32))
        multiply_into(sums, q_rows[part], k_rows)
        weights.copy_(sums).mul_(k_scale).mul_(q_scale[part].unsqueeze(1))
        weights.sub_(weights.amax(1, keepdim=True)).exp_()
        rounded = work.take(torch.bfloat16, count, tokens).copy_(weights)
        mixed = torch.mm(rounded, values, out=work.take(torch.bfloat16, count, channels)).float()
        out[part] = mixed.div_(weights.sum(1, keepdim=True))
