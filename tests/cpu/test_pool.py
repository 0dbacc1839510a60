"""Defends: every row is processed once, and the number of threads stays bounded, also after errors."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from zimage_core.cpu.pool import MAX_WORKERS, _Pool, in_parallel

TASKS = Path("/proc/self/task")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, MAX_WORKERS + 3])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 100, 1000])
def test_every_row_is_visited_once(threads, rows):
    torch.set_num_threads(threads)
    seen: list[tuple[int, int]] = []
    in_parallel(lambda start, stop: seen.append((start, stop)), rows)
    ranges = sorted(seen)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert all(start % 8 == 0 for start, _ in ranges)
    assert len(ranges) <= max(1, min(threads, MAX_WORKERS))
    assert torch.get_num_threads() == threads


def test_workers_share_the_threads_out_and_nobody_else_notices():
    torch.set_num_threads(4)
    inside: list[int] = []
    in_parallel(lambda *_: inside.append(torch.get_num_threads()), 1000)
    assert inside == [1] * 4
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *fresh] == [4, 4]


def test_a_task_may_spread_again():
    torch.set_num_threads(2)
    done: list[int] = []
    in_parallel(lambda start, stop: in_parallel(lambda a, b: done.append(b - a), stop - start), 64)
    assert sum(done) == 64


def test_the_pool_survives_a_fault():
    torch.set_num_threads(2)

    def fault(start: int, stop: int) -> None:
        raise ValueError(f"rows from {start}")

    with pytest.raises(ValueError, match="rows from 0"):
        in_parallel(fault, 100)
    seen: list[int] = []
    in_parallel(lambda start, stop: seen.append(stop - start), 100)
    assert sum(seen) == 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_makes_its_own_threads():
    torch.set_num_threads(2)
    in_parallel(lambda *_: None, 100)
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        in_parallel(lambda start, stop: seen.append(stop - start), 100)
        os._exit(0 if sum(seen) == 100 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads by /proc")
def test_openmp_knows_more_threads_than_workers():
    """So that GNU's OpenMP lets idle threads sleep; they would spin on the workers' cores."""
    before = len(list(TASKS.iterdir()))
    pool = _Pool(3)
    try:
        assert len(list(TASKS.iterdir())) - before == 2 * pool.workers
    finally:
        pool.executor.shutdown()
