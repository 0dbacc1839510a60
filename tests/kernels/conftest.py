"""Where kernels run: tests/conftest.py decides between interpreter and GPU, without Triton none is tested."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from zimage_core.kernels import tiles

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The interpreter's tensors, or the GPU's; one session has only one of them."""
    if request.param == "cpu" and not tiles.interpreted():
        pytest.skip("kernels are compiled here")
    return torch.device(request.param)


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """Kernels on, on a GPU that takes a path as an H100 does, no scratch yet; counts of what ran."""
    from zimage_core.kernels import dequantize as dequantize_module
    from zimage_core.kernels import matmul as matmul_module
    from zimage_core.kernels import planar
    from zimage_core.quant import dispatch, gpu

    counts: Counter[str] = Counter()

    def counted(module: object, name: str, key: str) -> None:
        original = getattr(module, name)

        def wrapper(*args: object, **options: object) -> object:
            counts[key] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, wrapper)

    monkeypatch.setattr(dispatch, "KERNELS", "on")
    monkeypatch.setattr(dispatch, "MODE", "auto")
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(gpu, "_local", gpu._Local())
    counted(matmul_module, "matmul", "fused")
    counted(dequantize_module, "dequantize_into", "dequantise")
    counted(planar, "repack", "repack")
    return counts
