"""What a LoRA costs in a step on a CPU: a block of full width, and a step of the embedded model.

    python -m benchmarks.lora [--tokens 544] [--rounds 5] [--rank 16]

Blocks with and without the LoRA take turns in one process, on one thread, and `time.thread_time` counts only
that thread's own time, so that other programs disturb little. Times are medians of the rounds, and the cost
is that of one over the other. The LoRA is one of all seven matrices of a block. Results go to
benchmarks/results/lora.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.report import RESULTS, machine
from zimage_core import ZImagePipeline
from zimage_core.adapters.change import Branch, Change
from zimage_core.config import TransformerConfig
from zimage_core.formats import FORMATS
from zimage_core.memory.int8_rows import KeptRows
from zimage_core.models.transformer import TransformerBlock
from zimage_core.nn.compute import set_compute
from zimage_core.nn.layers import rotation
from zimage_core.nn.linear import Linear
from zimage_core.quant.arithmetic import arithmetic_of
from zimage_core.quant.int8 import quantize_weight
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.encode import random_blocks

CASES = ("exact, Q8_0", "exact, Q4_K", "int8, Q4_K", "int8, rows kept")
OUT = RESULTS / "lora.json"


def block_of(case: str) -> TransformerBlock:
    """A block of full width with random weights of a case's format and arithmetic."""
    mode, form = case.split(", ")
    config = TransformerConfig()
    with torch.device("meta"):
        block = TransformerBlock(config, modulated=True)
    block = block.to_empty(device="cpu").requires_grad_(False)
    rng = np.random.default_rng(0)
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name == "weight" else 0.0)
    for name, layer in layers_of(block).items():
        fmt = FORMATS["Q8_0" if form == "Q8_0" else "Q4_K"]
        shape = (layer.out_features, layer.in_features)
        weight: Any = QuantTensor(torch.from_numpy(random_blocks(fmt, shape, rng)), fmt, shape)
        if mode == "int8":
            layer.arithmetic = arithmetic_of(f"layers.0.{name}", "int8")
            if form == "rows kept":
                weight = quantize_weight(weight, layer.arithmetic.rotated)
        layer.weight = weight
    return block


def layers_of(block: TransformerBlock) -> dict[str, Linear]:
    """The matrices that a step multiplies by; adaptive norms are computed once in a run."""
    return {
        name: each for name, each in block.named_modules() if isinstance(each, Linear) and "adaLN" not in name
    }


def branches(layers: dict[str, Linear], rank: int) -> dict[str, Branch]:
    """A LoRA of random numbers for each layer."""
    generator = torch.Generator().manual_seed(0)

    def pair(layer: Linear) -> Change:
        down = torch.randn(rank, layer.in_features, generator=generator) * 0.01
        return Change(down=down, up=torch.randn(layer.out_features, rank, generator=generator) * 0.01)

    return {name: Branch(layer, [(pair(layer), 1.0)]) for name, layer in layers.items()}


def alternate(work: Callable[[], Any], layers: dict[str, Linear], rank: int, rounds: int) -> dict[str, Any]:
    """Seconds of thread time without and with the LoRA, in turns, after one round that counts for nothing."""
    own = branches(layers, rank)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(rounds + 1):
        for which, seconds in times.items():
            for name, layer in layers.items():
                layer.branch = own[name] if which == "with" else None
            start = time.thread_time()
            work()
            if number:
                seconds.append(time.thread_time() - start)
    before, after = (median(times[which]) for which in ("without", "with"))
    return {"without_s": before, "with_s": after, "cost": after / before - 1, "rounds": times}


@torch.no_grad()
def full_width(case: str, tokens: int, rank: int, rounds: int) -> dict[str, Any]:
    """A block of full width."""
    block = block_of(case)
    config = TransformerConfig()
    positions = torch.arange(tokens).unsqueeze(1).expand(-1, 3)
    rope = rotation(positions, config.axes_dims, config.rope_theta)
    x = torch.randn(tokens, config.dim, generator=torch.Generator().manual_seed(1))
    modulation = torch.zeros(4 * config.dim)
    return alternate(lambda: block(x, rope, modulation=modulation), layers_of(block), rank, rounds)


@torch.no_grad()
def embedded(compute: str, rank: int, rounds: int) -> dict[str, Any]:
    """A step of the embedded model at its own size."""
    pipe = ZImagePipeline.from_default()
    set_compute(pipe.transformer, compute, torch.device("cpu"))
    transformer = pipe.transformer
    side = pipe.sample_size // 8
    caption = torch.randn(40, transformer.config.cap_feat_dim, generator=torch.Generator().manual_seed(2))
    prepared = transformer.prepare([caption], [0.0], (side, side))
    latent = torch.randn(16, side, side, generator=torch.Generator().manual_seed(3))
    layers = {
        name: each
        for name, each in transformer.named_modules()
        if isinstance(each, Linear) and name.startswith("layers.") and "adaLN" not in name
    }
    with KeptRows().bound(transformer, 1 << 40, False):
        return alternate(lambda: transformer.step(latent, prepared, 0), layers, rank, rounds)


def show(case: str, row: dict[str, Any]) -> None:
    """One line of the result."""
    print(f"{case}: {row['without_s']:.4f} s -> {row['with_s']:.4f} s, {row['cost']:+.1%}", flush=True)


def main() -> None:
    """Measure, print and write all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=544, help="of a block: 1088 is an image of 512 px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": machine(torch.device("cpu")), "tokens": args.tokens, "rank": args.rank, "full width": {},
        "embedded": {},
    }  # fmt: skip
    for case in CASES:
        found["full width"][case] = row = full_width(case, args.tokens, args.rank, args.rounds)
        show(f"full width, {case}", row)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    for compute in ("exact", "int8"):
        found["embedded"][compute] = row = embedded(compute, args.rank, 4 * args.rounds)
        show(f"embedded, {compute}", row)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
