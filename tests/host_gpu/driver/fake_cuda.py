"""Counters and settings of the CUDA that is not there, for a process that `run` started."""

import ctypes
import os
import sys

try:
    _library = ctypes.CDLL(None)  # what is preloaded is among the process's own symbols
    _library.fake_counters.restype = ctypes.c_char_p
    _library.fake_launched.restype = ctypes.c_char_p
    _library.fake_count.restype = ctypes.c_long
    _library.fake_used.restype = _library.fake_most.restype = ctypes.c_size_t
    _library.fake_set_total.argtypes = [ctypes.c_size_t]
    _library.fake_set_delays.argtypes = [ctypes.c_long] * 3
    _library.fake_take.argtypes = [ctypes.c_int, ctypes.c_long]
    _library.fake_take_at.argtypes = [ctypes.c_long, ctypes.c_size_t]
    _library.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_long]
except AttributeError:
    sys.exit(
        "fake_cuda: this process has no fake CUDA, or an old build; start it with tests/host_gpu/driver/run"
    )

_NAMES = _library.fake_counters().decode().split()

OUT_OF_MEMORY, UNAVAILABLE, ILLEGAL_ADDRESS, LAUNCH_FAILURE, UNKNOWN = 2, 46, 700, 719, 999
"""Numbers of cudaError: MemoryAllocation, DevicesUnavailable, IllegalAddress, LaunchFailure, Unknown."""

WAITS = ("synchronize", "event_wait", "copy_wait", "free")
"""Counters of calls for which the host waits; `synchronize` is of streams and devices."""


def settings(**wanted):
    """Restart this program with environment variables that are not set; call it before torch is imported."""
    missing = {name: str(value) for name, value in wanted.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


class Counts(dict):
    """Calls by kind; the difference of two is what was called between them."""

    def __sub__(self, other):
        return Counts({name: self[name] - other[name] for name in self})


def counts():
    """All counters as they are now."""
    return Counts({name: _library.fake_count(i) for i, name in enumerate(_NAMES)})


def used(device=0):
    """Bytes that the driver has given out on a device and not got back, without its own context."""
    return _library.fake_used(device)


def most(device=0, reset=False):
    """Their peak since the last reset."""
    return _library.fake_most(device, int(reset))


def set_memory(nbytes):
    """Let every device have this much memory, before torch has asked how much there is."""
    _library.fake_set_total(nbytes)


def has_context(device=0):
    """Whether a call has made a context on a device, which takes FAKE_CONTEXT_MB of its memory."""
    return bool(_library.fake_has_context(device))


def take(nbytes, at_malloc=0, device=0):
    """Let another program take memory, at most what is free; a negative number gives it back.

    With `at_malloc` = n the nth cudaMalloc from now on finds it taken, on the device that it asks.
    """
    if at_malloc:
        _library.fake_take_at(at_malloc, nbytes)
    else:
        _library.fake_take(device, nbytes)


def fail(kind, nth=1, error=UNKNOWN, times=1, sticky=False):
    """Let the nth call of a kind from now on fail, and the next ones up to `times`; nth = 0 takes it back.

    `kind` is the name of a counter: malloc, host_alloc, copy, launch, blas, graph_launch, module, event (its
    creation), record, event_wait, event_query, stream_wait, synchronize, free. A sticky error is returned by
    every later call until the process ends. The environment variable FAKE_FAIL=kind:nth:error:times,... asks
    for the same at the start of a process, with 0 times for a sticky one.
    """
    if not _library.fake_fail(kind.encode(), nth, error, 0 if sticky else times):
        raise ValueError(f"fake_cuda: no counter {kind!r}; there are {', '.join(_NAMES)}")


def launched(reset=False):
    """Kernels and products by name since the last reset, not counting those of fast mode."""
    lines = _library.fake_launched(int(reset)).decode().splitlines()
    return {name: int(count) for count, name in (line.split(" ", 1) for line in lines)}


def set_delays(any_us=0, copy_us=0, launch_us=0):
    """Usual delays in microseconds: of each operation, and beside it of copies to the device and of launches.

    A delay is drawn evenly from 0 to twice that; one in sixteen is eight times as long.
    """
    _library.fake_set_delays(any_us, copy_us, launch_us)


def set_fast(on):
    """In fast mode a launch is counted and nothing else, so that host times are those of the program."""
    _library.fake_set_fast(int(on))
