"""Threads that each do a whole share of a job with single-threaded torch operations.

Torch splits every operation over its threads and waits for all of them at its end. A dequantiser is
hundreds of operations of some ten microseconds, so the waiting costs more than the work, and all of
it again when another process takes one of the cores. Here a thread takes a range of rows through
dequantisation and multiplication alone, and there is one wait a matrix.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

MAX_WORKERS = 8
"""Beyond this Python's own lock is the limit; each worker then gets several torch threads."""

Task = Callable[[int, int], None]
"""(start, stop) -> None: does the work of a range of rows."""


class _Inside(threading.local):
    worker = False


_inside = _Inside()


class _Pool:
    """An executor whose workers share out `threads` torch threads among them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.workers = min(threads, MAX_WORKERS)
        self.executor = ThreadPoolExecutor(self.workers, thread_name_prefix="zimage-cpu")
        everyone = threading.Barrier(self.workers)

        def settle() -> None:
            # A thread takes the process's number at its first question and may then set its own. Setting
            # it also changes the process's, which is put back below when all threads have theirs.
            torch.get_num_threads()
            torch.set_num_threads(threads // self.workers)
            _inside.worker = True
            everyone.wait()

        wait([self.executor.submit(settle) for _ in range(self.workers)])
        torch.set_num_threads(threads)


_lock = threading.Lock()
_pool: _Pool | None = None


def _forget() -> None:
    """Start anew in a forked child, where the threads are gone and the lock may have been held."""
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _submit(share: Task, rows: int, multiple: int, threads: int) -> list[Future[None]]:
    """Hand the ranges to the pool for that many threads: a new one after set_num_threads."""
    global _pool
    with _lock:  # nobody retires the pool between here and the last submission
        if _pool is None or _pool.threads != threads:
            if _pool is not None:
                _pool.executor.shutdown(wait=False)
            _pool = _Pool(threads)
        size = -(-rows // (_pool.workers * multiple)) * multiple
        return [
            _pool.executor.submit(share, start, min(start + size, rows)) for start in range(0, rows, size)
        ]


def in_parallel(task: Task, rows: int, multiple: int = 8) -> None:
    """Run `task` over 0..rows, cut into one range for each thread; return when all are done.

    Ranges start at multiples of `multiple`. With one torch thread, and inside a task, the caller
    runs all of it. The first exception of a task is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1 or rows < 2 * multiple or _inside.worker:
        task(0, rows)
        return
    inference = torch.is_inference_mode_enabled()  # modes belong to a thread

    def share(start: int, stop: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            task(start, stop)

    futures = _submit(share, rows, multiple, threads)
    wait(futures)
    for future in futures:
        future.result()
