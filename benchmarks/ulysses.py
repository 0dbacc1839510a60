"""A step on two ranks of one thread each, over a step of one process of one thread, on a CPU.

    python -m benchmarks.ulysses FOLDER [--pixels 512] [--rounds 3] [--compute exact int8]

Makes transformer_6_layers.gguf in the folder, if it is not there: six full-width layers and both refiners in
Q4_K_M, of random weights. Both ways take turns: in a round, rank 0 draws alone while rank 1 waits, then both
draw together. The first step of each run is left out, as it also prepares what the steps share. `exchange` is
what the exchanges of a step take, the waits for the slower rank included; `transfer` is what they take where
both ranks come at the same time, measured by itself; `bytes` is what a rank sends to the other in a step.
Figures of two ranks are those of the slower one. CPU times are of all threads of a process, and do not change
where other programs run beside.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.make_full_size import write_transformer
from benchmarks.report import RESULTS, markdown, write
from zimage_core import ZImagePipeline, load_transformer, pipeline
from zimage_core.config import TransformerConfig
from zimage_core.parallel.group import Group, Link
from zimage_core.parallel.ulysses import Ulysses
from zimage_core.run.denoise import Denoiser

RANKS, LAYERS, CAPTION, STEPS = 2, 6, 100, 3
WAIT = 1800.0
"""Seconds that a rank waits for the other."""


class Timed(Group):
    """A group that measures its exchanges."""

    seconds = 0.0
    shapes: list[tuple[int, list[int], list[int]]]

    def exchange(self, x: torch.Tensor, sends: Any, receives: Any) -> torch.Tensor:
        """As `Group.exchange`."""
        begun = time.perf_counter()
        out = super().exchange(x, sends, receives)
        self.seconds += time.perf_counter() - begun
        self.shapes.append((len(x), list(sends), list(receives)))
        return out


def drawn(pipe: ZImagePipeline, pixels: int, parallel: Ulysses | None) -> tuple[float, float]:
    """Medians over the steps but the first: seconds, and seconds of CPU time of this process."""
    width = pipe.transformer.config.cap_feat_dim
    caption = torch.randn(CAPTION, width, generator=torch.Generator().manual_seed(1))

    def made(*given: Any) -> Denoiser:
        return Denoiser(*given[:-1], parallel)

    pipeline.Denoiser = made  # type: ignore[misc, assignment]
    marks: list[float] = []

    def note(*_: Any) -> None:
        marks.append(time.process_time())

    result = pipe(
        prompt_embeds=[caption], height=pixels, width=pixels, num_inference_steps=STEPS, seed=0,
        output_type="latent", callback_on_step_end=note,
    )  # fmt: skip
    busy = [later - earlier for earlier, later in pairwise(marks)]
    return statistics.median(result.timings.steps[1:]), statistics.median(busy)


def transferred(group: Timed, count: int) -> float:
    """Seconds of the exchanges of a step alone."""
    shapes = group.shapes[-count - 1 : -1]  # behind them, the ranks compared their times
    found = []
    for _ in range(3):
        group.barrier()
        begun = time.perf_counter()
        for length, sends, receives in shapes:
            Group.exchange(group, torch.zeros(length), sends, receives)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def rank(number: int, args: argparse.Namespace, store: str) -> None:
    """Take part in all rounds; rank 0 writes the figures."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=RANKS)
    group = Timed(Link(range(RANKS), WAIT), range(RANKS), torch.device("cpu"))
    found = {mode: compared(group, args, mode) for mode in args.compute}
    if number == 0:
        sizes = {
            "pixels": args.pixels,
            "layers": LAYERS,
            "caption": CAPTION,
            "rounds": args.rounds,
            "ranks": RANKS,
        }
        write(args.out, {**sizes, "modes": found})
    dist.destroy_process_group()


def compared(group: Timed, args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Seconds of a step on one rank and on two, and the median ratio of the rounds."""
    pipe = ZImagePipeline(transformer=load_transformer(path_of(args.folder), compute=mode))
    found: dict[str, list[float]] = {name: [] for name in ("one", "two", "one_cpu", "two_cpu", "exchange")}
    group.shapes = []
    for _ in range(args.rounds):
        group.barrier()
        one = drawn(pipe, args.pixels, None) if group.rank == 0 else (0.0, 0.0)
        group.barrier()
        group.seconds = 0.0
        two = drawn(pipe, args.pixels, Ulysses(group))
        slowest = group.gather(torch.tensor([[*two, group.seconds / STEPS]]), [1] * RANKS).amax(0)
        for name, value in zip(("two", "two_cpu", "exchange"), slowest.tolist(), strict=True):
            found[name].append(value)
        for name, value in zip(("one", "one_cpu"), one, strict=True):
            found[name].append(value)
    count = 2 * len(pipe.transformer.blocks) + 1
    transfer = transferred(group, count)
    figures = {
        **found,
        "ratio": statistics.median(map(truediv, found["one"], found["two"])),
        "ratio_cpu": statistics.median(map(truediv, found["one_cpu"], found["two_cpu"])),
        "transfer": transfer,
        "transfer_share": transfer / statistics.median(found["two"]),
        "bytes": 4 * sum(sends[1 - group.rank] for _, sends, _ in group.shapes[-count - 1 : -1]),
    }
    if group.rank == 0:
        print(mode, figures, flush=True)
    return figures


def table(report: Mapping[str, Any]) -> str:
    """A row a mode: medians of a step, and what the exchanges take of it."""
    rows = []
    for mode, found in report["modes"].items():
        one, two, one_cpu, two_cpu = (
            statistics.median(found[name]) for name in ("one", "two", "one_cpu", "two_cpu")
        )
        shown = (f"{one:.1f} s", f"{two:.1f} s", f"{found['ratio']:.2f}", f"{one_cpu:.1f} / {two_cpu:.1f} s")
        exchange = f"{found['transfer']:.2f} s, {found['bytes'] / 1e6:.0f} MB"
        rows.append([f"`{mode}`", *shown, f"{found['ratio_cpu']:.2f}", exchange])
    head = "one process | two | times as fast | CPU time, one / two | its ratio | exchanges"
    return markdown(f"compute, {report['pixels']} px | {head}", rows)


def path_of(folder: Path) -> Path:
    """The transformer, written if it is not there."""
    path = folder / f"transformer_{LAYERS}_layers.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_transformer(path, TransformerConfig(n_layers=LAYERS))
    return path


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute", nargs="+", default=["exact", "int8"])
    parser.add_argument("--out", type=Path, default=RESULTS / "ulysses.json")
    args = parser.parse_args()
    path_of(args.folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # also of libraries, from the start of each rank
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank, (args, f"{folder}/store"), nprocs=RANKS)


if __name__ == "__main__":
    main()
