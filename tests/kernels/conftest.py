"""Kernels run in Triton's interpreter where there is no GPU; without Triton nothing here is collected."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    # read when a kernel is defined, so before any import of one
    os.environ.setdefault("TRITON_INTERPRET", "1")
