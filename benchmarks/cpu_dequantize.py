"""Time to dequantise one 10240x3840 matrix per format on one core, by tile-sized repeats.

    python benchmarks/cpu_dequantize.py [--formats Q4_K Q8_0] [--repeats 40]

The matrix of the spec's table is worked through in slabs of 256 rows, as `ops.linear` does, into one
reused result. A slab is timed alone, in CPU seconds of the thread: other processes then cost cache but
not time.
Exactness against the reference is checked first: a wrong decoder is not timed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from zimage_core.cpu.dequantize import dequantize_into
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks

ROWS, WIDTH, SLAB = 10240, 3840, 256
RESULTS = Path(__file__).parent / "results" / "cpu_dequantize.json"


def measure(fmt: BlockFormat, repeats: int) -> dict[str, float | str]:
    """Milliseconds for the whole matrix: least, median, p20 and p80 over slabs."""
    packed = random_blocks(fmt, (SLAB, WIDTH), np.random.default_rng(0))
    rows = torch.from_numpy(packed)
    out = torch.empty(SLAB, WIDTH)
    dequantize_into(out, rows, fmt)
    if not np.array_equal(out[:4].numpy(), reference(packed[:4], fmt.name), equal_nan=True):
        raise SystemExit(f"{fmt.name} is not exact; nothing is timed")
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        dequantize_into(out, rows, fmt)
        times.append((time.thread_time() - start) * 1e3 * ROWS / SLAB)
    low, mid, high = np.quantile(times, (0.2, 0.5, 0.8))
    figures = {"min_ms": min(times), "p20_ms": low, "median_ms": mid, "p80_ms": high}
    return {"format": fmt.name, **{key: round(float(value), 1) for key, value in figures.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    # 3840 holds whole blocks of every format
    rows = []
    for name in given.formats:
        rows.append(measure(FORMATS[name], given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "what": f"ms to dequantise {ROWS}x{WIDTH} to float32, slabs of {SLAB} rows",
        "torch": torch.__version__,
        "threads": 1,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "repeats": given.repeats,
    }
    given.out.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
