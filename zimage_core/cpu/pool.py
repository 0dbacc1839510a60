"""A pool of threads, each of which processes a range of rows with single-threaded torch operations.

Torch divides every operation among its threads and waits for all of them at its end. A dequantiser is
hundreds of operations of some ten microseconds, so the waiting costs more than the work, and more still if
another process uses one of the cores. Here one thread dequantises and multiplies a whole range of rows, and
there is only one wait per matrix.

GNU's OpenMP lets torch's own threads spin for milliseconds after each operation, on cores that the workers
need: this doubled the CPU time of a text encoder. It lets them sleep at once if it knows of more threads than
there are cores. Every worker therefore starts one more thread, which then sleeps.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

MAX_WORKERS = 8
"""Most workers, because Python's own lock limits more of them; each then has several torch threads."""

_SPREAD = 1 << 18
"""Elements of an operation that torch divides among two threads."""

Task = Callable[[int, int], None]
"""(start, stop) -> None: processes a range of rows."""


class _Inside(threading.local):
    worker = False


_inside = _Inside()


class _Pool:
    """An executor whose workers have `threads` torch threads in total."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.workers = min(threads, MAX_WORKERS)
        self.executor = ThreadPoolExecutor(self.workers, thread_name_prefix="zimage-cpu")
        everyone = threading.Barrier(self.workers)

        def settle() -> None:
            # A thread copies the process's number at its first query and may then set its own. Setting it
            # also changes the process's number, which is restored below when all threads have theirs.
            torch.get_num_threads()
            torch.set_num_threads(2)
            torch.ones(_SPREAD).add_(1)
            torch.set_num_threads(threads // self.workers)
            _inside.worker = True
            everyone.wait()

        wait([self.executor.submit(settle) for _ in range(self.workers)])
        torch.set_num_threads(threads)


_lock = threading.Lock()
_pool: _Pool | None = None


def _forget() -> None:
    """Start again in a forked child, which has no threads and whose lock may be held."""
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _submit(share: Task, rows: int, multiple: int, threads: int) -> list[Future[None]]:
    """Submit the ranges to the pool; after set_num_threads, a new pool is made."""
    global _pool
    with _lock:  # no other thread may shut the pool down before the last submission
        if _pool is None or _pool.threads != threads:
            if _pool is not None:
                _pool.executor.shutdown(wait=False)
            _pool = _Pool(threads)
        size = -(-rows // (_pool.workers * multiple)) * multiple
        return [
            _pool.executor.submit(share, start, min(start + size, rows)) for start in range(0, rows, size)
        ]


def in_parallel(task: Task, rows: int, multiple: int = 8) -> None:
    """Run `task` over 0..rows, divided into one range per thread; return when all are done.

    Ranges start at multiples of `multiple`. With one torch thread, or inside a task, the caller runs
    everything itself. The first exception of a task is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1 or rows < 2 * multiple or _inside.worker:
        task(0, rows)
        return
    inference = torch.is_inference_mode_enabled()  # the mode is per thread, so it is passed on

    def share(start: int, stop: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            task(start, stop)

    futures = _submit(share, rows, multiple, threads)
    wait(futures)
    for future in futures:
        future.result()
