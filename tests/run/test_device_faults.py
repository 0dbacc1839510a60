"""What torch, Triton and the libraries raise becomes an error of one sentence, of the right kind."""

from __future__ import annotations

import pytest
import torch

from zimage_core.errors import DeviceFault, OutOfMemory
from zimage_core.run.device_faults import explained

GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nSearch for ...",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Triton Error [HIP]:  Code: 719, Message: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
    ],
)
def test_a_driver_that_fails_is_a_device_fault(text):
    found = explained(RuntimeError(text), GPU, limited=False)
    assert type(found) is DeviceFault
    assert text.partition("\n")[0] in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nSearch for ...",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_is_missing_outside_of_torchs_allocator_is_no_fault(text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 29)
    assert type(explained(RuntimeError(text), GPU, limited=False)) is OutOfMemory


@pytest.mark.parametrize("text", ["shape '[2]' is invalid for input of size 3", "out of memory", ""])
def test_other_errors_are_left_alone(text):
    assert explained(RuntimeError(text), GPU, limited=True) is None
