"""Figures that docs/kernels.md calls a model: from byte counts, assumed rates and instruction counts.

Run as `python -m benchmarks.model`. Nothing is measured; the rates are those that `quant.dispatch` assumes.
"""

from __future__ import annotations

import json

from benchmarks import cases
from benchmarks.report import arguments, write
from benchmarks.tables import compiled_rows
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
    args = arguments(__doc__, "model.json").parse_args()
    gpu, fmt = ARCHITECTURES[ARCH], FORMATS[NAME]
    weights = cases.TRANSFORMER.hidden_dim * cases.TRANSFORMER.dim
    packed, dense = fmt.nbytes / fmt.weights, 2.0
    linear = 1e12 * cases.teraflops(cases.block_linears())
    attention = 1e12 * cases.teraflops(cases.attention())
    step = (linear + attention / ATTENTION) / gpu.tensor_flops
    traffic = sum(case.weights for case in cases.block_linears()) * (packed + dense)
    count = [
        float(row["per_weight"])
        for row in compiled_rows()
        if (row["kernel"], row["target"], row["format"]) == ("matmul", ARCH, NAME)
        and row["tile"].startswith("32x64")
    ][-1]
    figures = {
        "assumed": {
            "architecture": ARCH,
            "flops": gpu.tensor_flops,
            "bandwidth": gpu.bandwidth,
            "issue": ISSUE,
        },
        "crossover_rows": {name: crossover(fmt, name) for name in ARCHITECTURES},
        "step_1024_ms": {"resident": 1e3 * step, "floor": 1e3 * (linear + attention) / gpu.tensor_flops},
        "dequantise_a_step": {
            "bytes": traffic,
            "ms": 1e3 * traffic / gpu.bandwidth,
            "over_step": traffic / gpu.bandwidth / step,
        },
        "w1_us": {
            "weights": weights,
            "dequantise": 1e6 * weights * (packed + dense) / gpu.bandwidth,
            "dequantise_and_read": 1e6 * weights * (packed + 2 * dense) / gpu.bandwidth,
            "fused_reads": 1e6 * weights * packed / gpu.bandwidth,
            "fused_instructions": 1e6 * weights * count / ISSUE,
            "instructions_a_weight": count,
        },
    }
    print(json.dumps(figures, indent=1))
    write(args.out, figures)


if __name__ == "__main__":
    main()
