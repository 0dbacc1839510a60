"""compute-sanitizer over the kernels: no access outside a tensor, no race in shared memory."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

TOOL = shutil.which("compute-sanitizer")
# the smallest launches of each kernel; under the tool every access is checked, a hundred times slower
CASES = {
    "test_dequantize.py": "partial or odd or empty",
    "test_planar.py": "partial or odd",
    "test_matmul.py": "bias",
    "test_matmul_places.py": "anyhow or anywhere",
    "test_elementwise.py": "not opcheck and not compile",
}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
@pytest.mark.parametrize(("file", "cases"), CASES.items())
def test_the_sanitizer_finds_nothing(check, file, cases):
    command = [
        TOOL, "--tool", check, "--error-exitcode", "99", "--target-processes", "all",
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", cases, f"tests/kernels/{file}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
