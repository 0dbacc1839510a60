"""What torch's caching allocator asks a GPU's driver for, by its rules (c10/cuda/CUDACachingAllocator.cpp).

Pure numbers: a plan counts with them, and nothing of torch is loaded for it.
"""

from __future__ import annotations

SMALL_TENSOR = 1 << 20
"""Bytes up to which tensors share segments of SMALL_SEGMENT."""
SMALL_SEGMENT = 2 << 20
"""Bytes; segments of more are multiples of it."""
MIDDLE_TENSOR, MIDDLE_SEGMENT = 10 << 20, 20 << 20
"""Bytes below which a tensor gets a segment of so many."""
SMALL_SEGMENTS = 12 << 20
"""Bytes of the segments for the small tensors of a phase, and of the rounding of its weights."""
GAPS = {"encode": 0.25, "denoise": 0.1, "decode": 0.12}
"""Bytes that the allocator leaves unused between the temporary tensors of a phase, over the bytes of those.
tests/memory/test_gaps.py compares it with the allocator's rules, followed on the meta device."""
PLANE_GAPS = 0.05
"""Bytes that it leaves between planes, over the bytes of those."""
WORKSPACE = {"sm_90": 32 << 20, "sm_100": 32 << 20, "sm_103": 32 << 20}
"""Bytes that the library of products takes for itself, by family; OTHER_WORKSPACE elsewhere. Source: PyTorch,
notes on CUDA semantics, cuBLAS workspaces."""
OTHER_WORKSPACE = 9 << 20


def segment(nbytes: int) -> int:
    """Bytes of the segment that a tensor gets where no free block holds it."""
    if nbytes <= SMALL_TENSOR:
        return SMALL_SEGMENT if nbytes else 0
    if nbytes < MIDDLE_TENSOR:
        return MIDDLE_SEGMENT
    return -(-nbytes // SMALL_SEGMENT) * SMALL_SEGMENT
