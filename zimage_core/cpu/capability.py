"""What this CPU multiplies quickly: its instructions by name, and rates measured once in a process.

The instructions alone do not decide. A library may not use them (an old torch, an environment variable that
limits oneDNN), and without them `torch._int_mm` is a plain loop, 30 times slower than float32, or oneDNN adds
pairs of products in int16, which saturates: the sums of large integers are then wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from zimage_core.cpu import packed_int8

SIZE = (288, 1024, 1024)
"""Rows, depth and columns of the products that are measured: 17 ms in float32 with 70 GFLOP/s, once warm."""
TINY = (32, 128, 128)
"""Size that is tried first: half a millisecond even for a plain loop."""
TOO_SLOW = 12.0
"""GFLOP/s of a tiny product below which no larger one is tried; AVX2 has 30 and more in float32."""
INT8_GAIN, BFLOAT16_GAIN = 1.5, 1.2
"""Rate over float32's from which on int8 or bfloat16 pays: preparing the operands has a price as well."""
ONE_ROW_GAIN = 0.25
"""Rate over float32's from which on fewer bits pay for one row."""
ONE_ROW = (512, 1024)
"""Rows and columns of the matrix that is multiplied with one row: 2 MiB in float32."""

_CPUINFO = Path("/proc/cpuinfo")
_NAMES = (
    ("AVX512", ("avx512f",)),
    ("AVX2", ("avx2",)),
    ("AMX", ("amx_tile",)),
    ("VNNI", ("avx512_vnni", "avx_vnni")),
    ("BF16", ("avx512_bf16", "amx_bf16")),
    ("NEON", ("asimd",)),
    ("SVE", ("sve",)),
    ("I8MM", ("i8mm",)),
    ("BF16", ("bf16",)),
)
"""Short names, with the flags in /proc/cpuinfo of which one suffices."""
_lock = threading.Lock()
_rates: Rates | None = None
_one_row: OneRow | None = None


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of one thread for products of each type; zero where torch has none or its sums are wrong."""

    float32: float
    bfloat16: float
    int8: float


@dataclass(frozen=True)
class OneRow:
    """Billions of weights a second that one thread multiplies with one row; zero where torch cannot."""

    float32: float
    int4: float
    int8: float
    packed_int8: float


@cache
def features() -> str:
    """The instructions that matter here, as "AVX512, VNNI, BF16"; torch's own name where they are unknown."""
    flags = _flags()
    found = [name for name, any_of in _NAMES if not flags.isdisjoint(any_of)]
    if "AVX512" in found:
        found.remove("AVX2")
    return ", ".join(dict.fromkeys(found)) or str(torch.backends.cpu.get_cpu_capability())


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 four at a time: AVX512-VNNI, AVX-VNNI, AMX or ARM's I8MM."""
    return not {"VNNI", "AMX", "I8MM"}.isdisjoint(features().split(", "))


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16: AVX512-BF16, AMX or ARM's BF16."""
    return "BF16" in features().split(", ")


def int8_pays() -> bool:
    """Whether `torch._int_mm` was measured at 1.5 times float32's rate or more."""
    found = rates()
    return found.int8 >= INT8_GAIN * found.float32


def bfloat16_pays() -> bool:
    """Whether the CPU multiplies bfloat16 and that was measured at 1.2 times float32's rate or more."""
    return has_bfloat16() and rates().bfloat16 >= BFLOAT16_GAIN * rates().float32


def int4_pays() -> bool:
    """Whether nibbles times one row were measured at a quarter of the rate of dense float32, or more.

    Both lie in the cache there. In memory nibbles are a sixth of the bytes. With AVX2 they have 0.6 of the
    rate, with AVX512 more than all of it; without either, torch's product of nibbles is a plain loop.
    """
    found = rates_of_one_row()
    return found.int4 >= ONE_ROW_GAIN * found.float32


def int8_one_row_pays() -> bool:
    """Whether int8 rows times one row of bfloat16 were measured at that rate."""
    found = rates_of_one_row()
    return found.int8 >= ONE_ROW_GAIN * found.float32


def packed_int8_pays() -> bool:
    """Whether FBGEMM's product of int8 rows was measured at that rate, and does not saturate."""
    found = rates_of_one_row()
    return found.packed_int8 >= ONE_ROW_GAIN * found.float32


def rates_of_one_row() -> OneRow:
    """Rates of one thread for one row, measured at the first call: some 10 ms of CPU time."""
    global _one_row
    with _lock:
        if _one_row is None:
            with ThreadPoolExecutor(1, thread_name_prefix="zimage-measure") as alone:
                _one_row = alone.submit(_measured_one_row).result()
        return _one_row


def rates() -> Rates:
    """Rates of one thread for 288 x 1024 x 1024, measured at the first call: some 50 ms of CPU time.

    Where a tiny product is slow already, its rate is the answer.
    """
    global _rates
    with _lock:
        if _rates is None:
            # a new thread has the process's number of threads and can restore it; the caller's may differ
            with ThreadPoolExecutor(1, thread_name_prefix="zimage-measure") as alone:
                _rates = alone.submit(_measured).result()
        return _rates


def _measured() -> Rates:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return Rates(*(_rate(multiply, dtype) for multiply, dtype in _PRODUCTS))
    finally:
        torch.set_num_threads(threads)


def _measured_one_row() -> OneRow:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return OneRow(*(_rate_of_one_row(each.name) for each in fields(OneRow)))
    finally:
        torch.set_num_threads(threads)


def _rate_of_one_row(kind: str) -> float:
    """The best of three products; the one before does not count."""
    rows, depth = ONE_ROW
    x = torch.ones(1, depth, dtype=torch.bfloat16 if kind in ("int4", "int8") else torch.float32)
    try:
        multiply, weight = _one_row_product(kind, rows, depth)
        if not ((multiply(x, weight.t()) - 2 * depth).abs() < 0.01 * depth).all():
            return 0.0
    except (AttributeError, RuntimeError):  # torch has no such product on this platform
        return 0.0
    return 1e-9 * rows * depth / max(min(_seconds(multiply, x, weight) for _ in range(3)), 1e-7)


def _one_row_product(kind: str, rows: int, depth: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """A product (x, W^T) -> x W^T, and W full of twos."""
    if kind == "float32":
        return torch.mm, torch.full((rows, depth), 2.0)
    if kind == "int8":
        ones = torch.ones(rows, dtype=torch.bfloat16)
        return (lambda x, turned: torch._weight_int8pack_mm(x, turned.t(), ones)), torch.full(
            (rows, depth), 2, dtype=torch.int8
        )
    if kind == "packed_int8":  # the largest integers, whose sums saturate on some CPUs
        values = torch.full((rows, depth), 127, dtype=torch.int8)
        scale = torch.full((rows,), 2 / 127)
        packed = packed_int8.pack(lambda start, stop: (values[start:stop], scale[start:stop]), rows)
        return (lambda x, _: packed_int8.multiply(x, packed)), values
    scales = torch.ones(depth // 32, rows, 2, dtype=torch.bfloat16)
    codes = torch.full((rows, depth), 9, dtype=torch.int32)
    product = torch._weight_int4pack_mm_for_cpu
    nibbles = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return (lambda x, turned: product(x, turned.t(), 32, scales)), nibbles  # 1 * (9 - 8) + 1


def _rate(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    """GFLOP/s of the better of two products; the first call, which chooses and compiles, does not count."""
    rate, most = 0.0, 127 if dtype == torch.int8 else 1
    for rows, depth, columns in (TINY, SIZE):
        x, weight = (torch.full((count, depth), most, dtype=dtype) for count in (rows, columns))
        try:
            sums = multiply(x, weight.t())
        except RuntimeError:  # torch has no such product on this platform
            return 0.0
        if not (sums == most * most * depth).all():
            return 0.0
        seconds = min(_seconds(multiply, x, weight) for _ in range(2))
        rate = 2e-9 * rows * depth * columns / max(seconds, 1e-7)
        if rate < TOO_SLOW:
            break
    return rate


def _seconds(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    # a thread's own time does not count what other processes took; some systems keep it too coarsely
    fine = time.get_clock_info("thread_time").resolution < 1e-5
    clock = time.thread_time if fine else time.perf_counter
    start = clock()
    multiply(x, weight.t())
    return clock() - start


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch._int_mm(x, weight)
    return out


_PRODUCTS: tuple[tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype], ...] = (
    (torch.mm, torch.float32),
    (torch.mm, torch.bfloat16),
    (_int_mm, torch.int8),
)


@cache
def _flags() -> frozenset[str]:
    """Flags of the first CPU in /proc/cpuinfo; where there is no such file, what torch tells."""
    try:
        lines = _CPUINFO.read_text("ascii", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    asked: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.12 and newer
    return frozenset(name.replace("avx512_f", "avx512f") for name, value in asked.items() if value is True)
