"""Draw from a full-size model on the CPU, quantise one, or compare one: times, and memory from /proc.

    python -m benchmarks.make_full_size FOLDER
    python -m benchmarks.full_size FOLDER [--size 256 --steps 2] [--ram 4GiB] [--compute int8]
    python -m benchmarks.make_full_size FOLDER --bf16
    python -m benchmarks.full_size FOLDER --quantize Q4_K_M
    python -m benchmarks.full_size FOLDER --parity

Anonymous memory is what was allocated, file-backed memory is the mapped files. torch is imported late, since
its import is part of the cold start.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def resident() -> dict[str, int]:
    """Bytes of this process by the names in /proc: RssAnon, RssFile, and VmHWM, the peak of both together."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = ("RssAnon:", "RssFile:", "VmHWM:")
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0] in wanted}


class MemoryWatch(threading.Thread):
    """Peak of anonymous and of file-backed resident memory, in bytes, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"anonymous_peak": 0, "mapped_peak": 0, "resident_peak": 0}
        self.done = threading.Event()

    def run(self) -> None:
        """Look until `done` is set."""
        while not self.done.wait(0.02):
            now = resident()
            found = (now["RssAnon"], now["RssFile"], now["RssAnon"] + now["RssFile"])
            pairs = zip(self.peaks.items(), found, strict=True)
            self.peaks = {name: max(peak, value) for (name, peak), value in pairs}


def draw(args: argparse.Namespace) -> dict[str, Any]:
    """Open the three files and draw one image."""
    watch = MemoryWatch()
    watch.start()
    begin = time.perf_counter()
    from zimage_core import ZImagePipeline

    imported = time.perf_counter()
    files = {
        "transformer": args.folder / "transformer.gguf",
        "text_encoder": args.folder / "text_encoder.gguf",
        "vae": args.folder / "vae.safetensors",
    }
    pipe = ZImagePipeline.from_files(**files, ram=args.ram, compute=args.compute)
    opened = time.perf_counter()
    cpu: list[float] = []

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        cpu.append(time.process_time())

    result = pipe(
        args.prompt, height=args.size, width=args.size, num_inference_steps=args.steps, seed=0,
        callback_on_step_end=step_end,
    )  # fmt: skip
    finished = time.perf_counter()
    watch.done.set()
    watch.join()
    on_disk = sum(f.stat().st_size for f in files.values())
    figures: dict[str, Any] = {
        "size": args.size,
        "ram": args.ram,
        "compute": args.compute,
        "steps": args.steps,
        "seconds": {
            "import": imported - begin,
            "open": opened - imported,
            "run": finished - opened,
            "cold_start_to_image": finished - begin,
            **asdict(result.timings),
            # of all threads; the first step is left out, since what comes before it is in the same difference
            "cpu_of_later_steps": [b - a for a, b in pairwise(cpu)],
        },
        "bytes": {
            "files": on_disk,
            **watch.peaks,
            "resident_above_files": watch.peaks["resident_peak"] - on_disk,
        },
    }
    if result.memory is not None:
        figures["streamed"] = {
            name: {"bytes": t.bytes_moved, "stall_seconds": t.stall_seconds, "overlap": t.overlap}
            for name, t in result.memory.traffic.items()
        }
        figures["planned_peak"] = result.memory.plan.peak
    return figures


def quantise(args: argparse.Namespace) -> dict[str, Any]:
    """Quantise bf16.safetensors; the GGUF is removed."""
    from zimage_core import quantize_file

    source, out = args.folder / "bf16.safetensors", args.folder / f"{args.quantize}.gguf"
    before, cpu = resident()["VmHWM"], time.process_time()
    done = quantize_file(source, out, args.quantize, overwrite=True)
    cpu = time.process_time() - cpu
    out.unlink()
    return {
        "type": args.quantize,
        "source_bytes": source.stat().st_size,
        "nbytes": done.nbytes,
        "tensors": done.types,
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "source_mb_per_s": round(source.stat().st_size / done.seconds / 1e6, 1),
        "peak_rss_bytes": resident()["VmHWM"],
        "rss_before_bytes": before,
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the transformer with diffusers', block by block."""
    import torch

    from zimage_core.cpu.capability import features
    from zimage_core.parity import compare_with

    path, watch, begin = args.folder / "transformer.gguf", MemoryWatch(), time.perf_counter()
    watch.start()
    needs: list[str] = []
    report = compare_with(path, parts=["transformer"], on_part=needs.append)
    watch.done.set()
    watch.join()
    blocks = report.components[0].blocks
    return {
        "cpu": features(),
        "threads": torch.get_num_threads(),
        "file_bytes": path.stat().st_size,
        "said_before": needs,
        "seconds": round(time.perf_counter() - begin, 1),
        "bytes": watch.peaks,
        "passes": report.passes,
        "largest_share_of_tolerance": max(block.error / block.tolerance for block in blocks),
        "report": report.to_json(),
    }


def main() -> None:
    """Write the figures of one of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ram", help="limit of host memory, such as 4GiB")
    parser.add_argument("--compute", default="exact", help="in which numbers the blocks multiply")
    parser.add_argument("--prompt", default="a lighthouse on a cliff at dusk, oil painting, 黄昏的灯塔")
    parser.add_argument("--quantize", metavar="MIX", help="quantise bf16.safetensors instead of drawing")
    parser.add_argument("--parity", action="store_true", help="compare transformer.gguf with diffusers")
    parser.add_argument("--out", type=Path, help="default: by what was done, in benchmarks/results")
    args = parser.parse_args()
    figures = quantise(args) if args.quantize else compare(args) if args.parity else draw(args)
    print(json.dumps(figures, indent=1))
    from benchmarks.report import write

    name = "quantize_full_size" if args.quantize else "parity_full_size" if args.parity else "full_size_cpu"
    write(args.out or RESULTS / f"{name}.json", figures)


if __name__ == "__main__":
    main()
