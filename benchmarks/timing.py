"""The one timer: variants in turn inside every repeat, medians with p20 and p80, and the device's ceilings.

On a GPU a sample is one stretch between two device events over many calls, which take their inputs in
rotation from more copies than the second-level cache holds: weights come from memory, as they do in a step.
Where the call can be captured, the stretch is the replay of a CUDA graph, so that it holds no launch gap.
On a CPU a sample is wall or CPU time of as many calls as a millisecond takes.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Call = Callable[[int], Any]
"""One call; the number says which copy of the inputs it takes."""

STRETCH = {"cpu": 1e-3, "cuda": 4e-3}
"""Least seconds of one sample."""
MOST_CALLS = 400
LAST_LEVEL = 256 << 20
"""Bytes of the last cache of AMD's accelerators, which lies behind the second level and is not reported."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, one number a repeat, and how they were taken."""

    seconds: tuple[float, ...]
    how: str = "wall"

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    def quantile(self, q: float) -> float:
        """Seconds."""
        return float(np.quantile(self.seconds, q))

    def ratio(self, other: Samples) -> float:
        """Median over repeats of the ratio within a repeat; below 1 where this one is faster."""
        return float(np.median([a / b for a, b in zip(self.seconds, other.seconds, strict=True)]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the 20th and the 80th percentile, for a result file."""
    low, mid, high = np.quantile(values, (0.2, 0.5, 0.8))
    return {"median": round(float(mid), 4), "p20": round(float(low), 4), "p80": round(float(high), 4)}


@dataclass(frozen=True)
class Budget:
    """How long to measure: repeats, and seconds for all variants of a case, whichever ends later."""

    repeats: int = 20
    seconds: float = 0.4
    most: float = 60.0
    """Seconds after which a case ends anyway, once it has three repeats."""
    cpu_time: bool = False
    """On a CPU: seconds of the process, which with one thread are an estimate on a busy machine."""


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


def take_turns(samplers: Mapping[str, Callable[[], float]], budget: Budget) -> dict[str, list[float]]:
    """Take samples of all in turn until the budget is used up: seconds by name, as many for each."""
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    begin = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while True:
            for name, sample in samplers.items():
                seconds[name].append(sample())
            done, passed = len(next(iter(seconds.values()))), time.perf_counter() - begin
            if (done >= budget.repeats and passed >= budget.seconds) or (done >= 3 and passed >= budget.most):
                return seconds
    finally:
        if collecting:
            gc.enable()


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    budget: Budget,
    rotation: int = 1,
    capture: Mapping[str, bool] | None = None,
) -> dict[str, Samples]:
    """Time all variants in turn.

    Args:
        calls: Variants by name.
        device: Where they run.
        budget: How often.
        rotation: Copies of the inputs; call i gets i modulo this.
        capture: Whether a variant may be captured into a CUDA graph; default no.

    Returns:
        Samples by name, as many for each.
    """
    stretches = {
        name: _stretch(call, device, rotation, bool(capture and capture.get(name)), budget.cpu_time)
        for name, call in calls.items()
    }
    seconds = take_turns({name: sample for name, (sample, _) in stretches.items()}, budget)
    return {name: Samples(tuple(values), stretches[name][1]) for name, values in seconds.items()}


def _stretch(
    call: Call, device: torch.device, rotation: int, capture: bool, cpu_time: bool
) -> tuple[Callable[[], float], str]:
    """(seconds of a call as the mean over a run of calls that is timed as a whole, how it is timed)."""
    for i in range(min(rotation, 3)):  # compiles, allocates, fills caches of the library
        call(i)
    if device.type == "cuda":
        clock, how = (lambda work: _device_seconds(work, device)), "events"
    else:
        now, how = (time.process_time, "cpu time") if cpu_time else (time.perf_counter, "wall")
        clock = lambda work: _host_seconds(work, now)  # noqa: E731
    once = clock(lambda: call(0))
    count = int(min(MOST_CALLS, max(1, np.ceil(STRETCH[device.type] / max(once, 1e-9)))))
    if capture and device.type == "cuda":
        # a graph's time per call is shorter than the first guess, which held the launch
        count = int(min(MOST_CALLS, max(count * 4 if once < 1e-3 else count, rotation)))
        graph = _captured(call, count, rotation)
        if graph is not None:
            graph.replay()
            return lambda: clock(graph.replay) / count, "graph"
    return lambda: clock(lambda: _loop(call, count, rotation)) / count, how


def _loop(call: Call, count: int, rotation: int) -> None:
    for i in range(count):
        call(i % rotation)


def _host_seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def _device_seconds(work: Callable[[], Any], device: torch.device) -> float:
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
    budget = Budget(repeats=7, seconds=0.2, most=5, cpu_time=cpu_time)
    count = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 4) if gpu else 256 << 20
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure({"copy": lambda _: target.copy_(source)}, device, budget)["copy"]
    side = 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = measure({"mm": lambda _: torch.mm(a, b.t(), out=out)}, device, budget)["mm"]
    return Ceilings(2 * count / copy.median, {name_of(dtype): 2.0 * side**3 / product.median})


def name_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
