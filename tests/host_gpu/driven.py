"""Runs the programs of this folder under the driver that is not there, and reads what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TIMEOUT = 600
"""Seconds after which a program counts as stuck."""


def python() -> Path:
    """The Python of a venv with torch's CUDA build: FAKE_CUDA_PYTHON, this one, or that of .venv-cuda."""
    if given := os.environ.get("FAKE_CUDA_PYTHON"):
        return Path(given)
    own = Path(sys.prefix, "bin/python")
    return own if _driver(own).exists() else ROOT / ".venv-cuda/bin/python"


def _driver(program: Path) -> Path:
    folder = os.environ.get("FAKE_CUDA") or program.parent.parent / "fake_cuda"
    return Path(folder, "libcuda.so.1")


@lru_cache
def missing() -> str:
    """What has to be done before a program can run here; empty if it can."""
    command = "run tests/host_gpu/driver/build, which downloads 3 GB"
    if not python().exists():
        return f"needs torch's CUDA build in .venv-cuda: {command}"
    if not _driver(python()).exists():
        return f"needs {_driver(python())}: {command} where torch's CUDA build is not there yet"
    folder = HERE / "driver"
    sources = [*sorted(folder.glob("*.h")), folder / "fake_cuda.cpp", folder / "make_stubs.py"]
    text = b"".join(path.read_bytes() for path in sources)
    now = subprocess.run(["cksum"], input=text, capture_output=True, check=True).stdout
    built = _driver(python()).with_name("sources")
    if not built.exists() or built.read_bytes() != now:
        return f"{_driver(python())} is of other sources: {command} where torch's CUDA build is not there yet"
    return ""


def run(name: str, *arguments: object, **environment: object) -> dict:
    """What a program found.

    Raises:
        AssertionError: It ended in an error; the message has the end of its output.
    """
    command = [HERE / "driver/run", python(), HERE / f"programs/{name}.py", *arguments]
    settings = {key: str(value) for key, value in environment.items()}
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, f"{name} {arguments}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])
