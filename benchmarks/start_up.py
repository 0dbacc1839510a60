"""How long things take before any image: imports, `zimage inspect`, opening a Qwen-sized vocabulary.

    python -m benchmarks.start_up [--repeats 7]

Every figure is of a fresh process, wall seconds, the jobs in turn inside each repeat. gguf.GGUFReader takes
so long on the vocabulary that it runs once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.make_full_size import vocabulary
from benchmarks.report import NANO, arguments, write
from benchmarks.timing import Budget, spread, take_turns
from zimage_core.weights.gguf_writer import lay_out

OPEN = "; s = time.perf_counter(); {}; print(time.perf_counter() - s)"


def process(*command: str) -> float:
    """Wall seconds of a fresh process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def inside(code: str) -> float:
    """Seconds that a fresh interpreter prints, so without its own start."""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and write the figures."""
    parser = arguments(__doc__, "start_up.json")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(lay_out({"general.architecture": "qwen3", **vocabulary()}, []).header)
        opening = f"import time; from {{}} import {{}} as R{OPEN.format(f'R({str(path)!r})')}"
        zimage = f"{Path(sys.executable).parent}/zimage"
        importing = OPEN.format("import zimage_core")
        ours = opening.format("zimage_core.weights.gguf", "GGUFFile")
        jobs = {
            "import zimage_core after torch": lambda: inside(f"import time, torch{importing}"),
            "import torch": lambda: inside(f"import time{OPEN.format('import torch')}"),
            "python -c pass": lambda: process(sys.executable, "-c", "pass"),
            "zimage inspect, nano transformer": lambda: process(
                zimage, "inspect", f"{NANO}/transformer.gguf"
            ),
            "zimage inspect, Qwen vocabulary": lambda: process(zimage, "inspect", str(path)),
            "open Qwen vocabulary, zimage_core": lambda: inside(ours),
        }
        seconds = take_turns(jobs, Budget(args.repeats, 0.0))
        seconds["open Qwen vocabulary, gguf.GGUFReader"] = [inside(opening.format("gguf", "GGUFReader"))]
    figures = {"summary": {name: spread(s) for name, s in seconds.items()}}
    print(json.dumps(figures, indent=1))
    write(args.out, {**figures, "seconds": seconds})


if __name__ == "__main__":
    main()
