"""Quantise a full-size transformer of random weights: time, and peak memory of the process.

    python -m benchmarks.quantize_full_size FOLDER [--type Q4_K_M]

FOLDER gets bf16.safetensors (6.15 G Gaussian weights, 12.3 GB; kept for the next run) and the GGUF, which is
removed. The peak is the kernel's VmHWM: private memory and touched pages of mapped files together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import RESULTS, machine
from zimage_core import quantize_file
from zimage_core.config import TransformerConfig
from zimage_core.export import safetensors_file
from zimage_core.files.atomic import atomic_file
from zimage_core.formats import FORMATS
from zimage_core.weights import names

POOL = 1024
"""Distinct rows per length; a matrix repeats them in random order, which keeps this quick."""


def write_source(path: Path, config: TransformerConfig) -> None:
    """A bfloat16 checkpoint in the single-file layout, weights of deviation 0.02, norms around one."""
    shapes = names.checkpoint_shapes(names.transformer_table(config, "fused"))
    layout = safetensors_file.lay_out({}, [(n, s, FORMATS["BF16"]) for n, s in shapes.items()])
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    pools: dict[int, np.ndarray] = {}
    with atomic_file(path, nbytes=layout.nbytes) as file:
        file.write(layout.header)
        for name, shape in shapes.items():
            if shape[-1] not in pools:
                rows = torch.randn(POOL, shape[-1], generator=generator) * 0.02
                pools[shape[-1]] = rows.bfloat16().view(torch.int16).numpy()
            data = pools[shape[-1]][rng.integers(0, POOL, int(np.prod(shape[:-1])))]
            if "norm" in name:
                data = torch.ones(shape, dtype=torch.bfloat16).view(torch.int16).numpy()
            file.seek(layout.places[name][0])
            file.write(data.tobytes())


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize_full_size.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / "bf16.safetensors"
    if not source.exists():
        # another process, so that its memory is not counted here
        child = os.fork()
        if not child:
            write_source(source, TransformerConfig(n_layers=args.layers))
            os._exit(0)
        os.waitpid(child, 0)
    out = args.folder / f"{args.type}.gguf"
    before, cpu = peak_bytes(), time.process_time()
    done = quantize_file(source, out, args.type, overwrite=True)
    cpu = time.process_time() - cpu
    out.unlink()
    figures = {
        "machine": machine(),
        "type": args.type,
        "source_bytes": source.stat().st_size,
        "nbytes": done.nbytes,
        "tensors": done.types,
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "source_mb_per_s": round(source.stat().st_size / done.seconds / 1e6, 1),
        "peak_rss_bytes": peak_bytes(),
        "rss_before_bytes": before,
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
