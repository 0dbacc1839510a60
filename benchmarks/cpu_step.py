"""A step over six full-width S3-DiT layers: packed weights against dense float32 and diffusers' GGUF path.

    python -m benchmarks.cpu_step [--formats Q4_K Q8_0] [--tokens 288 1056] [--repeats 7] [--layers 6]

Dense, packed and diffusers run one after the other inside every repeat, so that a change of the
machine's speed meets all of them; the ratio is taken within each repeat and its median reported, with
p20 and p80, next to the ratio of the medians. Random blocks: speed does not depend on the values. The
outputs of the packed and of the dequantised layer are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import RESULTS, spread, write
from zimage_core.config import TransformerConfig
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.models.transformer import TransformerBlock
from zimage_core.nn.linear import Linear
from zimage_core.nn.rope import rotation
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.encode import random_blocks

CONFIG = TransformerConfig(
    dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, cap_feat_dim=2560, hidden_dim=10240
)
DEFAULT = ("Q4_K", "Q8_0")
Step = Callable[[], Tensor]


def blank_layers(count: int) -> list[TransformerBlock]:
    """Blocks whose matrices are still on the meta device; the small parameters are ones."""
    with torch.device("meta"):
        layers = [TransformerBlock(CONFIG, modulated=True) for _ in range(count)]
    for layer in layers:
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 1:
                    setattr(module, name, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
    return layers


def packed_layers(fmt: BlockFormat, count: int) -> list[TransformerBlock]:
    """Layers with random blocks; each matrix has memory of its own, filled with 64 random rows."""
    layers = blank_layers(count)
    rng = np.random.default_rng(0)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Linear):
                shape = (module.out_features, module.in_features)
                some = torch.from_numpy(random_blocks(fmt, (64, shape[1]), rng))
                module.assign(QuantTensor(some.repeat(shape[0] // 64, 1), fmt, shape), torch.float32)
    return layers


def dense_layers(count: int) -> list[TransformerBlock]:
    """Layers with random float32 weights."""
    layers = blank_layers(count)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Linear):
                weight = torch.empty(module.out_features, module.in_features).normal_(std=0.02)
                module.weight = nn.Parameter(weight, requires_grad=False)
    return layers


def diffusers_layers(packed: list[TransformerBlock], fmt: BlockFormat) -> list[TransformerBlock] | None:
    """The same blocks with diffusers' GGUFLinear over the same bytes; None where it lacks the type."""
    import gguf
    from diffusers.quantizers.gguf import utils

    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    if kind not in utils.dequantize_functions:
        return None
    layers = blank_layers(len(packed))
    for ours, theirs in zip(packed, layers, strict=True):
        for name, module in ours.named_modules():
            if isinstance(module, Linear) and isinstance(module.weight, QuantTensor):
                bias = module.bias
                linear = utils.GGUFLinear(
                    module.in_features, module.out_features, bias is not None, torch.float32, "meta"
                )
                linear.weight = utils.GGUFParameter(module.weight.packed, quant_type=kind)
                linear.bias = bias
                theirs.set_submodule(name, linear)
    return layers


def step(layers: list[TransformerBlock], x: Tensor, temb: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """One forward pass over all layers."""
    with torch.no_grad():
        for layer in layers:
            x = layer(x, turn, temb)
    return x


def check(packed: TransformerBlock, x: Tensor, temb: Tensor, turn: tuple[Tensor, Tensor]) -> None:
    """Packed and dequantised weights must give the same layer, or there is nothing to time."""
    dense = blank_layers(1)[0]
    for name, module in packed.named_modules():
        if isinstance(module, Linear) and isinstance(module.weight, QuantTensor):
            dense.get_submodule(name).weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    a, b = step([packed], x, temb, turn), step([dense], x, temb, turn)
    if not torch.allclose(a, b, rtol=1e-4, atol=1e-4):
        raise SystemExit(f"packed and dense layers differ by {(a - b).abs().max()}; nothing is timed")


def measure(fmt: BlockFormat, dense: list[TransformerBlock], given: argparse.Namespace) -> list[dict]:
    """One row for each number of tokens."""
    packed = packed_layers(fmt, given.layers)
    theirs = diffusers_layers(packed, fmt) if given.diffusers else None
    rows = []
    for tokens in given.tokens:
        x, temb = torch.randn(1, tokens, CONFIG.dim), torch.randn(1, CONFIG.adaln_dim)
        positions = torch.arange(tokens)[:, None].expand(-1, 3)
        turn = rotation(positions % 32, CONFIG.axes_dims, CONFIG.rope_theta)
        check(packed[0], x, temb, turn)
        runs = {"dense": dense, "packed": packed} | ({"diffusers": theirs} if theirs else {})
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(given.repeats + 1):
            for name, layers in runs.items():
                start = given.clock()
                step(layers, x, temb, turn)
                if repeat:  # the first one warms up
                    seconds[name].append(given.clock() - start)
        row = {"format": fmt.name, "tokens": tokens}
        row |= {f"{name}_s": spread(values) for name, values in seconds.items()}
        for other in ("dense", "diffusers"):
            if other in seconds:
                pairs = [a / b for a, b in zip(seconds["packed"], seconds[other], strict=True)]
                row[f"packed_over_{other}"] = spread(pairs)
                medians = np.median(seconds["packed"]) / np.median(seconds[other])
                row[f"packed_over_{other}_of_medians"] = round(float(medians), 4)
        row["raw_s"] = {name: [round(v, 4) for v in values] for name, values in seconds.items()}
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "raw_s"}), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(DEFAULT))
    parser.add_argument("--tokens", nargs="*", type=int, default=[288, 1056])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-diffusers", dest="diffusers", action="store_false")
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="CPU seconds instead of wall seconds: with --threads 1, an estimate on a busy machine",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_step.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dense = dense_layers(given.layers)
    rows = [row for name in given.formats for row in measure(FORMATS[name], dense, given)]
    header = {
        "what": f"seconds of one forward pass over {given.layers} S3-DiT layers of dim {CONFIG.dim}",
        "clock": given.clock.__name__,
    }
    write(given.out, {**header, "rows": rows})


if __name__ == "__main__":
    main()
