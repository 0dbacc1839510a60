"""Figures that docs/explanation/kernels.md calls a model: from byte counts and assumed rates.

Run as `python -m benchmarks.model`. Nothing is measured; `step_model.py` has the model.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks import cases, int8_model, step_model
from benchmarks.report import arguments, write
from benchmarks.step_model import GPUS, MAIN, Gpu, Range
from zimage_core.formats import FORMATS
from zimage_core.quant.dispatch import ARCHITECTURES, crossover

NAME = "Q4_K"
NAMES = (NAME, "Q8_0")
PIXELS = (1024, 512)


def _ms(value: Range) -> list[float]:
    return [round(1e3 * end, 3) for end in (value.low, value.high)]


def step(gpu: Gpu, pixels: int) -> dict[str, Any]:
    """Milliseconds of the parts of a step, each from low to high; what depends on the format by format."""
    costs = {name: step_model.step(gpu, name, pixels) for name in NAMES}
    cost = costs[NAME]
    return {
        "floor": round(1e3 * cost.floor, 3),
        "linears": _ms(cost.linears),
        "attention": {backend: _ms(value) for backend, value in cost.attention.items()},
        "dequantise": {name: _ms(each.dequantise) for name, each in costs.items()},
        "elementwise": _ms(cost.elementwise),
        "gaps": _ms(cost.gaps),
        "replayed": {name: _ms(each.replayed()) for name, each in costs.items()},
        "host": _ms(cost.host),
        "launches": cost.launches,
    }


def int8(gpu: Gpu, pixels: int) -> dict[str, Any]:
    """Milliseconds of a step in int8 and in 16 bits, and what an int8 q k^T would save of it."""
    cost = int8_model.step(gpu, NAME, pixels)
    return {
        "16 bits": _ms(cost.sixteen),
        "packed": _ms(cost.packed),
        "kept": _ms(cost.kept),
        "linears": _ms(cost.linears),
        "attention": _ms(cost.attention),
        "attention_16": _ms(cost.half),
        "attention_int8": _ms(cost.smooth),
        "quantise": _ms(cost.quantise),
        "elementwise": _ms(cost.elementwise),
        "gaps": _ms(cost.gaps),
        "attention_share": round(cost.attention_share, 3),
        "attention_gain": round(cost.attention_gain, 3),
    }


def matrix(gpu: Gpu) -> dict[str, Any]:
    """Microseconds of single limits of the largest matrix, w1, packed as Q4_K."""
    fmt = FORMATS[NAME]
    weights = cases.TRANSFORMER.hidden_dim * cases.TRANSFORMER.dim
    packed, dense = fmt.nbytes / fmt.weights, 2.0
    count = step_model.fused_instructions(NAME, gpu.architecture)
    return {
        "weights": weights,
        "dequantise_bytes": 1e6 * weights * (packed + dense) / gpu.copy,
        "fused_bytes": 1e6 * weights * packed / gpu.copy,
        "fused_instructions": 1e6 * weights * count / gpu.issue,
        "instructions_a_weight": count,
    }


def main() -> None:
    """Print and write them."""
    args = arguments(__doc__, "model.json").parse_args()
    fmt = FORMATS[NAME]
    packed = sum(case.weights for case in cases.step_linears() if case.k % fmt.weights == 0)
    traffic = packed * (fmt.nbytes / fmt.weights + 2.0)
    figures = {
        "assumed": {
            gpu.name: {"flops": gpu.flops, "copy": gpu.copy, "issue": gpu.issue} for gpu in GPUS.values()
        },
        "crossover_rows": {name: crossover(fmt, name) for name in ARCHITECTURES},
        "step_ms": {gpu.name: {str(pixels): step(gpu, pixels) for pixels in PIXELS} for gpu in GPUS.values()},
        "int8_ms": {
            card.name: {str(pixels): int8(card, pixels) for pixels in PIXELS}
            for card in int8_model.CARDS.values()
        },
        "dequantise_a_step": {"bytes": traffic, "ms_of_copy": 1e3 * traffic / MAIN.copy},
        "w1_us": matrix(MAIN),
    }
    print(json.dumps(figures, indent=1))
    write(args.out, figures)


if __name__ == "__main__":
    main()
