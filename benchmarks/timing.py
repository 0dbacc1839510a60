"""Seconds of a call: medians with p20 and p80, contestants in turn inside every repeat, ceilings beside them.

On a GPU a sample is one stretch between two device events over many calls, which take their inputs in
rotation from more copies than the second-level cache holds: weights come from memory, as they do in a step.
Where the call can be captured, the stretch is the replay of a CUDA graph, so that it holds no launch gap.
On a CPU a sample is wall time of as many calls as a millisecond takes.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

Call = Callable[[int], Any]
"""One call; the number says which copy of the inputs it takes."""

STRETCH = {"cpu": 1e-3, "cuda": 4e-3}
"""Least seconds of one sample."""
MOST_CALLS = 400
LAST_LEVEL = 256 << 20
"""Of AMD's accelerators, whose last cache lies behind the second level and is not reported."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, one number a repeat."""

    seconds: tuple[float, ...]
    how: str

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    def quantile(self, q: float) -> float:
        """Seconds."""
        return float(np.quantile(self.seconds, q))

    def ratio(self, other: Samples) -> float:
        """Median of the ratios of each repeat, below 1 where this one is faster."""
        return float(np.median([a / b for a, b in zip(self.seconds, other.seconds, strict=True)]))


@dataclass(frozen=True)
class Effort:
    """How long to measure: repeats, and seconds for all contestants of a case, whichever ends later."""

    repeats: int = 20
    seconds: float = 0.4
    most: float = 60.0
    """Seconds after which a case ends anyway, once it has three repeats."""
    cpu_time: bool = False
    """On a CPU the process's own seconds: with one thread, an estimate on a busy machine."""


@dataclass
class Ceilings:
    """What this device reaches in this run: bytes a second of a large copy, FLOP a second of a product."""

    copy: float = 0.0
    matmul: dict[str, float] = field(default_factory=dict)

    def floor(self, nbytes: float, flops: float, dtype: str) -> float:
        """Least seconds of a call that moves so many bytes and does so many operations."""
        rate = self.matmul.get(dtype, 0.0)
        return max(nbytes / self.copy if self.copy else 0.0, flops / rate if rate else 0.0)


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of `nbytes` do not fit the cache together, three times over."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    cache = max(cache, LAST_LEVEL) if torch.version.hip else cache
    return int(min(64, max(2, -(-3 * cache // max(nbytes, 1)) + 1)))


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    effort: Effort,
    rotation: int = 1,
    capture: Mapping[str, bool] | None = None,
) -> dict[str, Samples]:
    """Time all contestants in turn.

    Args:
        calls: Contestants by name.
        device: Where they run.
        effort: How often.
        rotation: Copies of the inputs; call i gets i modulo this.
        capture: Whether a contestant may be captured into a CUDA graph; default no.

    Returns:
        Samples by name, as many for each.
    """
    stretches = {
        name: _stretch(call, device, rotation, bool(capture and capture.get(name)), effort.cpu_time)
        for name, call in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while True:
            for name, stretch in stretches.items():
                seconds[name].append(stretch.sample())
            done, passed = len(next(iter(seconds.values()))), time.perf_counter() - begin
            if (done >= effort.repeats and passed >= effort.seconds) or (done >= 3 and passed >= effort.most):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(tuple(values), stretches[name].how) for name, values in seconds.items()}


@dataclass
class _Stretch:
    """A run of `count` calls that is timed as a whole."""

    sample: Callable[[], float]
    how: str


def _stretch(call: Call, device: torch.device, rotation: int, capture: bool, cpu_time: bool) -> _Stretch:
    least = STRETCH["cuda" if device.type == "cuda" else "cpu"]
    for i in range(min(rotation, 3)):  # compiles, allocates, fills caches of the library
        call(i)
    if device.type != "cuda":
        clock, how = (time.process_time, "cpu time") if cpu_time else (time.perf_counter, "wall")
        once = _host_seconds(lambda: call(0), clock)
        count = int(min(MOST_CALLS, max(1, np.ceil(least / max(once, 1e-9)))))
        return _Stretch(lambda: _host_seconds(lambda: _loop(call, count, rotation), clock) / count, how)
    once = _seconds(lambda: call(0), device)
    count = int(min(MOST_CALLS, max(1, np.ceil(least / max(once, 1e-9)))))
    if capture:
        # a graph's time per call is shorter than the first guess, which held the launch
        count = int(min(MOST_CALLS, max(count * 4 if once < 1e-3 else count, rotation)))
        graph = _captured(call, count, rotation)
        if graph is not None:
            graph.replay()
            return _Stretch(lambda: _seconds(graph.replay, device) / count, "graph")
    return _Stretch(lambda: _seconds(lambda: _loop(call, count, rotation), device) / count, "events")


def _loop(call: Call, count: int, rotation: int) -> None:
    for i in range(count):
        call(i % rotation)


def _host_seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _captured(call: Call, count: int, rotation: int) -> torch.cuda.CUDAGraph | None:
    """The calls as a graph, None where they cannot be captured."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _loop(call, rotation, rotation)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # the same stream, whose scratch and library workspaces exist by now
        with torch.cuda.graph(graph, stream=side):
            _loop(call, count, rotation)
    except RuntimeError:  # a copy from pageable memory, a synchronisation
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return None
    return graph


def warm_up(device: torch.device, seconds: float = 0.5) -> None:
    """Work until the clocks have risen."""
    if device.type != "cuda":
        return
    x = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            torch.mm(x, x)
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype, cpu_time: bool = False) -> Ceilings:
    """Measure the two ceilings on random data."""
    gpu = device.type == "cuda"
    warm_up(device)
    effort = Effort(repeats=7, seconds=0.2, most=5, cpu_time=cpu_time)
    count = (1 << 30) if gpu else (256 << 20)
    if gpu:
        count = min(count, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure({"copy": partial(_copy, target, source)}, device, effort)["copy"]
    side = 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = measure({"mm": lambda i: torch.mm(a, b.t(), out=out)}, device, effort)["mm"]
    return Ceilings(2 * count / copy.median, {name_of(dtype): 2.0 * side**3 / product.median})


def _copy(target: torch.Tensor, source: torch.Tensor, i: int) -> torch.Tensor:
    return target.copy_(source)


def name_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
