"""Decoding by two ranks of one thread each, over decoding by one process of one thread, on a CPU.

    python -m benchmarks.vae_ranks [--pixels 512] [--rounds 3]

The VAE has the full size and random weights. In a round, rank 0 decodes alone while rank 1 waits, whole and
in tiles, then both decode their strips together. CPU times are of all threads of a process, and do not change
where other programs run beside; that of two ranks is that of the busier one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import RESULTS, write
from zimage_core.config import AutoencoderConfig
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.vae_tiles import TILE
from zimage_core.parallel.group import Group, Link
from zimage_core.parallel.vae import strips

RANKS = 2
WAIT = 1800.0
"""Seconds that a rank waits for the other."""


def timed(call: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    """Seconds, seconds of CPU time, and what was computed."""
    begun, busy = time.perf_counter(), time.process_time()
    out = call()
    return time.perf_counter() - begun, time.process_time() - busy, out


def rank(number: int, args: argparse.Namespace, store: str) -> None:
    """Take part in all rounds; rank 0 writes the figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=RANKS)
    group = Group(Link(range(RANKS), WAIT), range(RANKS), torch.device("cpu"))
    side = args.pixels // 8
    vae, z = Autoencoder(AutoencoderConfig()), torch.randn(1, 16, side, side)
    ways = {"whole": partial(vae.decode, z), "tiled": partial(vae.decode, z, TILE)}
    found: dict[str, list[float]] = {}
    differences = []
    with torch.no_grad():
        for _ in range(args.rounds):
            alone: dict[str, Any] = {}
            if number == 0:
                alone = {name: timed(call) for name, call in ways.items()}
            group.barrier()
            strip = strips(group, side, side, TILE)
            wall, busy, image = timed(partial(vae.decode, z, strip=strip))
            slowest = group.gather(torch.tensor([[wall, busy]]), [1] * RANKS).amax(0).tolist()
            for name, (seconds, cpu, own) in alone.items():
                found.setdefault(name, []).append(seconds)
                found.setdefault(f"{name}_cpu", []).append(cpu)
                differences.append(float((own - image).abs().max()))
            for name, value in zip(("two", "two_cpu"), slowest, strict=True):
                found.setdefault(name, []).append(value)
    if number == 0:
        middle = {name: statistics.median(values) for name, values in found.items()}
        ratios = {
            "ratio": middle["whole"] / middle["two"], "ratio_cpu": middle["whole_cpu"] / middle["two_cpu"],
        }  # fmt: skip
        print({**middle, **ratios, "difference": max(differences)}, flush=True)
        sizes = {"pixels": args.pixels, "rounds": args.rounds, "ranks": RANKS, "tile": TILE}
        write(args.out, {**sizes, **found, **ratios, "difference": max(differences)})
    dist.destroy_process_group()


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "vae_ranks.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # also of libraries, from the start of each rank
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank, (args, f"{folder}/store"), nprocs=RANKS)


if __name__ == "__main__":
    main()
