"""Without Triton nothing here is collected; tests/conftest.py decides between interpreter and GPU."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
