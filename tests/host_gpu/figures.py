"""Launches, allocations and waits of a step and compiled kernels, as they are now: write figures.json anew.

    python -m tests.host_gpu.figures

A change of a figure belongs into the commit that causes it, with its reason.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.host_gpu import driven
from tests.host_gpu.sparse_models import write_models

FILE = Path(__file__).with_name("figures.json")
RUNS = {
    "1024 px, resident": ("--pixels", 1024),
    "1024 px, least": ("--pixels", 1024, "--vram", "least"),
    "512 px, resident": ("--pixels", 512),
}
"""Of full-size Q4_K_M files on sm_90."""


def measure(name: str, folder: Path) -> dict:
    """Figures of one of RUNS."""
    return driven.run("steps", "--files", folder, *RUNS[name])


def main() -> None:
    """Write the file.

    Raises:
        SystemExit: The programs cannot run here; the message says why.
    """
    if reason := driven.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        files = write_models(Path(folder))
        found = {name: measure(name, files) for name in RUNS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
