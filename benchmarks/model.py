"""Figures that docs/kernels.md calls a model: from byte counts, assumed rates and instruction counts.

Run as `python -m benchmarks.model`. Nothing is measured; the rates are those that `paths` assumes.
"""

from __future__ import annotations

import json

from benchmarks import cases, compile_table
from benchmarks.report import RESULTS, write
from zimage_core.formats import FORMATS
from zimage_core.quant.dispatch import ARCHITECTURES, crossover

ARCH = "sm_90"
ATTENTION = 0.65
"""Rate of fused attention over that of large products."""
ISSUE = 132 * 4 * 32 * 1.7e9
"""Instructions of threads a second: multiprocessors, schedulers, lanes, clock of an H200."""
NAME = "Q4_K"


def main() -> None:
    """Print and write them."""
    gpu, fmt = ARCHITECTURES[ARCH], FORMATS[NAME]
    n, k = cases.TRANSFORMER.hidden_dim, cases.TRANSFORMER.dim
    packed, dense = fmt.nbytes / fmt.weights, 2.0
    blocks = sum(case.weights for case in cases.block_linears())
    found = {"linear": cases.block_linears(), "attention": cases.attention()}
    flops = {name: 1e12 * cases.teraflops(each) for name, each in found.items()}
    step = flops["linear"] / gpu.tensor_flops + flops["attention"] / (ATTENTION * gpu.tensor_flops)
    traffic = blocks * (packed + dense)
    count = {
        row["format"]: float(row["per_weight"])
        for row in compile_table.read()
        if row["kernel"] == "matmul" and row["target"] == ARCH and row["tile"].startswith("32x64")
    }[NAME]
    once = n * k * (packed + dense) / gpu.bandwidth
    figures = {
        "assumed": {
            "architecture": ARCH,
            "flops": gpu.tensor_flops,
            "bandwidth": gpu.bandwidth,
            "issue": ISSUE,
        },
        "crossover_rows": {name: crossover(fmt, name) for name in ARCHITECTURES},
        "step_1024_ms": {"resident": 1e3 * step, "floor": 1e3 * sum(flops.values()) / gpu.tensor_flops},
        "dequantise_a_step": {
            "bytes": traffic,
            "ms": 1e3 * traffic / gpu.bandwidth,
            "over_step": traffic / gpu.bandwidth / step,
        },
        "w1_us": {
            "weights": n * k,
            "dequantise": 1e6 * once,
            "dequantise_and_read": 1e6 * n * k * (packed + 2 * dense) / gpu.bandwidth,
            "fused_reads": 1e6 * n * k * packed / gpu.bandwidth,
            "fused_instructions": 1e6 * n * k * count / ISSUE,
            "instructions_a_weight": count,
        },
    }
    print(json.dumps(figures, indent=1))
    write(RESULTS / "model.json", figures)


if __name__ == "__main__":
    main()
