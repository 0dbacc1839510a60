"""How long things take before any picture: imports, `zimage inspect`, opening a Qwen-sized vocabulary.

    python -m benchmarks.start_up [--repeats 7]

Every figure is of a fresh process, wall seconds, the contestants in turn inside each repeat. gguf.GGUFReader
takes so long on the vocabulary that it runs once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import RESULTS, spread, write
from tests.helpers import qwen_vocabulary
from tests.helpers.gguf_writer import GGUFWriter

NANO = Path(__file__).parent.parent / "zimage_core/assets/nano/transformer.gguf"
OPEN = "; s = time.perf_counter(); {}; print(time.perf_counter() - s)"


def process(*command: str) -> float:
    """Wall seconds of a fresh process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def inside(code: str) -> float:
    """Seconds that a fresh interpreter prints, so without its own start."""
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "start_up.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter()
        for key, value in qwen_vocabulary.gguf_metadata().items():
            writer.key(key, value, "i32") if key.endswith("token_type") else writer.key(key, value)
        writer.write(vocabulary)
        opening = f"import time; from {{}} import {{}} as R{OPEN.format(f'R({str(vocabulary)!r})')}"
        zimage = f"{Path(sys.executable).parent}/zimage"
        jobs = {
            "import zimage_core after torch": lambda: inside(
                f"import time, torch{OPEN.format('import zimage_core')}"
            ),
            "import torch": lambda: inside(f"import time{OPEN.format('import torch')}"),
            "python -c pass": lambda: process(sys.executable, "-c", "pass"),
            "zimage inspect, nano transformer": lambda: process(zimage, "inspect", str(NANO)),
            "zimage inspect, Qwen vocabulary": lambda: process(zimage, "inspect", str(vocabulary)),
            "open Qwen vocabulary, zimage_core": lambda: inside(
                opening.format("zimage_core.weights.gguf", "GGUFFile")
            ),
        }
        seconds = {name: [] for name in jobs}
        for _ in range(args.repeats):
            for name, job in jobs.items():
                seconds[name].append(job())
        seconds["open Qwen vocabulary, gguf.GGUFReader"] = [inside(opening.format("gguf", "GGUFReader"))]
    figures = {"summary": {name: spread(s) for name, s in seconds.items()}}
    print(json.dumps(figures, indent=1))
    write(args.out, {**figures, "seconds": seconds})


if __name__ == "__main__":
    main()
