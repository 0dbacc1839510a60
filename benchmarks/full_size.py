"""Run a full-size model on the CPU: time per step, cold start, memory above the mapped files.

    python -m benchmarks.make_full_size FOLDER
    python -m benchmarks.full_size FOLDER [--size 256 --steps 2] [--ram 4GiB]

Memory is read from /proc: anonymous memory is what was allocated, file-backed memory is the mapped files.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import asdict
from pathlib import Path


class MemoryWatch(threading.Thread):
    """Peak of anonymous and of file-backed resident memory, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.mapped = self.resident = 0
        self.done = threading.Event()

    def run(self) -> None:
        """Look every 20 ms."""
        while not self.done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            sizes = {
                line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")
            }
            anonymous, mapped = (int(sizes[k]) * 1024 for k in ("RssAnon", "RssFile"))
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)
            self.resident = max(self.resident, anonymous + mapped)


def main() -> None:
    """Load, run once, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ram", help="limit of host memory, such as 4GiB")
    parser.add_argument("--prompt", default="a lighthouse on a cliff at dusk, oil painting, 黄昏的灯塔")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "full_size_cpu.json")
    args = parser.parse_args()
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
    pipe = ZImagePipeline.from_files(**files, ram=args.ram)
    opened = time.perf_counter()
    result = pipe(args.prompt, height=args.size, width=args.size, num_inference_steps=args.steps, seed=0)
    finished = time.perf_counter()
    watch.done.set()
    watch.join()
    on_disk = sum(f.stat().st_size for f in files.values())
    figures = {
        "size": args.size,
        "ram": args.ram,
        "steps": args.steps,
        "seconds": {
            "import": imported - begin,
            "open": opened - imported,
            "run": finished - opened,
            "cold_start_to_image": finished - begin,
            **asdict(result.timings),
        },
        "bytes": {
            "files": on_disk,
            "anonymous_peak": watch.anonymous,
            "mapped_peak": watch.mapped,
            "resident_peak": watch.resident,
            "resident_above_files": watch.resident - on_disk,
        },
    }
    if result.memory is not None:
        figures["streamed"] = {
            name: {"bytes": t.bytes_moved, "stall_seconds": t.stall_seconds, "overlap": t.overlap}
            for name, t in result.memory.traffic.items()
        }
        figures["planned_peak"] = result.memory.plan.peak
    print(json.dumps(figures, indent=1))
    from benchmarks.report import write  # imports torch, whose time is measured above

    write(args.out, figures)


if __name__ == "__main__":
    main()
