"""Bench a block format of your own, 3 bits and a scale; docs/guides/block-format.md explains each part."""

import time
from typing import Any

import numpy as np
import torch

from zimage_core import FORMATS, dequantize, encode
from zimage_core.cpu.dequantize import DECODERS
from zimage_core.cpu.legacy import scale_header
from zimage_core.formats import BlockFormat, Field
from zimage_core.quantize.encode import ENCODERS
from zimage_core.reference import dequantize as oracle
from zimage_core.reference.bits import consecutive

Q3_32 = BlockFormat("Q3_32", None, 32, 14, (Field("d", "f2"), Field("qs", "u1", 8), Field("qh", "u1", 4)))
PAIRS, BITS = torch.arange(0, 8, 2), torch.arange(8)


def reference(blocks: Any) -> Any:
    """w = d * (q - 4); the lower 2 bits of q are in qs, its third in qh, both lowest first."""
    q = consecutive(blocks["qs"], 2) | consecutive(blocks["qh"], 1) << 2
    return blocks["d"].astype(np.float32) * (q.astype(np.float32) - 4)


def body(blocks: torch.Tensor, out: torch.Tensor, _work: object, d: torch.Tensor) -> None:
    """The same in torch: blocks uint8 [n, 14] and scales [n, 1] -> out float32 [n, 32]."""
    low, high = blocks[:, 2:10, None] >> PAIRS & 3, blocks[:, 10:, None] >> BITS & 1
    torch.mul((low.view(-1, 32) | high.view(-1, 32) << 2).float() - 4, d, out=out)


def encoder(weights: torch.Tensor, _importance: torch.Tensor | None) -> torch.Tensor:
    """The number farthest from 0 becomes code 0; the others go to the nearest code."""
    x = weights.view(-1, 32)
    d = (x.gather(1, x.abs().argmax(1, keepdim=True)) / -4).half()
    q = (x / torch.where(d == 0, 1, d.float()) + 4).round().clamp(0, 7).byte()
    low = ((q & 3).view(-1, 8, 4) << PAIRS).sum(-1).byte()
    high = ((q >> 2).view(-1, 4, 8) << BITS).sum(-1).byte()
    return torch.cat((d.view(torch.uint8), low, high), 1).view(len(weights), -1)


def main(rows: int = 1024, columns: int = 2560) -> dict[str, float]:
    """Print error and speed beside two formats of ggml, and whether both decoders agree to the bit."""
    FORMATS["Q3_32"], oracle.DEQUANTIZERS["Q3_32"] = Q3_32, reference
    ENCODERS["Q3_32"], DECODERS["Q3_32"] = encoder, (scale_header, body)
    weights, found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), {}
    for name in ("Q3_32", "Q3_K", "Q4_0"):
        packed, begin = encode(weights, name), time.perf_counter()
        dense = dequantize(packed, name)
        pace = (time.perf_counter() - begin) / weights.numel() * 1e9
        exact = np.array_equal(dense.numpy(), oracle.dequantize(packed.numpy(), name))
        found[name] = float((dense - weights).norm() / weights.norm())
        print(f"{name}: error {found[name]:.1%}, {pace:.1f} ns a weight, exact: {exact}")
    return found


if __name__ == "__main__":
    main()
