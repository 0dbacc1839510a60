"""Time to dequantise one 10240x3840 matrix per format on one core, by tile-sized repeats.

    python -m benchmarks.cpu_dequantize [--formats Q4_K Q8_0] [--repeats 40]

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

from benchmarks.report import RESULTS, spread, write
from zimage_core.cpu.dequantize import dequantize_into
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks

ROWS, WIDTH, SLAB = 10240, 3840, 256


def measure(fmt: BlockFormat, repeats: int) -> dict[str, object]:
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
    return {"format": fmt.name, "ms": spread(times) | {"min": round(min(times), 4)}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_dequantize.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # 3840 holds whole blocks of every format
    rows = []
    for name in given.formats:
        rows.append(measure(FORMATS[name], given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    header = {
        "what": f"ms to dequantise {ROWS}x{WIDTH} to float32, slabs of {SLAB} rows",
        "repeats": given.repeats,
    }
    write(given.out, {**header, "rows": rows})


if __name__ == "__main__":
    main()
