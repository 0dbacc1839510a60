"""Defends: a launch goes past Triton's dispatch only if everything that Triton looks at is as it was."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from zimage_core.cpu.dequantize import dequantize_into as by_torch
from zimage_core.formats import FORMATS
from zimage_core.kernels import launch
from zimage_core.kernels.dequantize import dequantize_into
from zimage_core.kernels.launch import LARGEST, Launch


@dataclass
class Pointer:
    """As much of a tensor on a GPU as a launch looks at."""

    dtype: torch.dtype = torch.bfloat16
    address: int = 512
    device: int = 0

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device


class Compiled:
    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *args: self.seen.append(("direct", grid, args))


@dataclass
class Kernel:
    """A function under triton.jit: each launch returns what was compiled."""

    seen: list = field(default_factory=list)

    def __getitem__(self, grid):
        def run(*args, **options):
            self.seen.append(("triton", grid, args, options))
            return Compiled(self.seen)

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def ways(kernel):
    return [each[0] for each in kernel.seen]


def test_the_second_launch_is_direct_and_has_all_arguments(kernel):
    go = Launch(kernel, {"SIZE": 64, "WIDE": True}, num_warps=4)
    x, y = Pointer(), Pointer(torch.float32)
    go((7, 1), (x, None, y), (3840,), (60, 1e-5))
    other = Pointer(address=1024)
    go((9, 2), (other, None, y), (3840,), (77, 1e-6))
    assert kernel.seen == [
        ("triton", (7, 1), (x, None, y, 3840, 60, 1e-5), {"SIZE": 64, "WIDE": True, "num_warps": 4}),
        ("direct", (9, 2, 1), (other, None, y, 3840, 77, 1e-6, 64, True)),
    ]


CHANGES = {
    "a dtype": ((Pointer(torch.float16), Pointer()), (3840,), (60,)),
    "no tensor": ((Pointer(), None), (3840,), (60,)),
    "an address": ((Pointer(), Pointer(address=514)), (3840,), (60,)),
    "a size": ((Pointer(), Pointer()), (3841,), (60,)),
    "bits of a length": ((Pointer(), Pointer()), (3840,), (LARGEST + 1,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_changes_goes_through_triton(kernel, change):
    go, usual = Launch(kernel, {}), ((Pointer(), Pointer()), (3840,), (60,))
    go((1, 1), *usual)
    go((1, 1), *CHANGES[change])
    go((1, 1), *usual)
    assert ways(kernel) == ["triton", "triton", "direct"]
    kept = change not in ("an address", "bits of a length")  # these are not remembered
    go((1, 1), *CHANGES[change])
    assert ways(kernel)[3] == ("direct" if kept else "triton")


def test_what_is_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "MOST", 3)
    go = Launch(kernel, {})
    for size in (1, 2, 3, 4, 4):
        go((1, 1), (Pointer(),), (size,), (1,))
        assert len(go._compiled) <= 3
    assert ways(kernel) == ["triton"] * 4 + ["direct"]


def test_another_device_is_made_current_and_compiles_for_itself(kernel, monkeypatch):
    current = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Guard)
    go = Launch(kernel, {})
    where = []
    monkeypatch.setattr(go, "_launch", lambda *args, run=go._launch: (where.append([*current]), run(*args)))
    for device in (0, 1, 1, 0):
        go((1, 1), (Pointer(device=device),), (), (1,))
    assert where == [[], [1], [1], []]
    assert ways(kernel) == ["triton", "triton", "direct", "direct"]


def test_amd_and_the_interpreter_leave_every_launch_to_triton(kernel, monkeypatch):
    go = Launch(kernel, {})
    for _ in range(2):
        go((1, 1), (torch.zeros(1),), (), (1,))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for _ in range(2):
        go((1, 1), (Pointer(),), (), (1,))
    assert ways(kernel) == ["triton"] * 4


def test_a_launch_that_is_repeated_writes_the_same(device):
    """On a GPU the second of each pair is direct, but for bytes that 16 does not divide."""
    fmt, generator = FORMATS["Q4_K"], torch.Generator().manual_seed(0)
    size = 8 * fmt.nbytes
    memory = torch.randint(0, 60, (size + 16,), generator=generator, dtype=torch.uint8)
    wanted = torch.empty(8, 256)
    for start in (0, 4, 0, 16):
        packed = memory[start : start + size].clone().view(8, -1)
        there = torch.empty(size + 16, dtype=torch.uint8, device=device)
        there[start : start + size] = packed.view(-1).to(device)
        by_torch(wanted, packed, fmt)
        for _ in range(2):
            out = torch.full((8, 256), float("nan"), device=device)
            dequantize_into(out, there[start : start + size].view(8, -1), fmt)
            assert torch.equal(out.cpu(), wanted)
