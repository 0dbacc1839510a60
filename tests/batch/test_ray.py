"""Batches on Ray: real clusters of this machine, whose workers and drivers are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zimage_core.batch.dataset import generate_dataset
from zimage_core.batch.model import Model
from zimage_core.batch.ray import Pool
from zimage_core.batch.worker import Failed, Row, Spec
from zimage_core.errors import ZImageError

ray = pytest.importorskip("ray", reason="needs ray")
pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"a {colour} circle", "seed": i} for i, colour in enumerate(["red", "blue", "green"] * 5)]
GUARD = 300.0
"""Seconds after which a test gives up waiting."""


@pytest.fixture(scope="module")
def cluster():
    """The address of two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    try:
        yield nodes.address
    finally:
        nodes.shutdown()


def processes(above: int) -> list[int]:
    """Processes that descend from one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, left = [], [above]
    while left:
        fresh = children.get(left.pop(), [])
        found += fresh
        left += fresh
    return found


def actors() -> list[int]:
    """Those of this process's cluster that draw."""
    return [pid for pid in processes(os.getpid()) if title(pid).startswith("ray::MapWorker")]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_two_workers_give_the_bytes_of_one_process_though_one_is_killed(cluster, tmp_path):
    killed = []

    def kill(report):
        if report.made == 3 and not killed:
            found = actors()
            assert len(found) == 2
            killed.append(found[0])
            os.kill(found[0], signal.SIGKILL)

    report = generate_dataset(
        ROWS, tmp_path / "two", format="webdataset", shard_size=4, ray=cluster, on_progress=kill
    )
    assert killed
    assert (report.made, report.failed) == (len(ROWS), ())
    generate_dataset(ROWS, tmp_path / "one", format="webdataset", shard_size=4)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


class Deadly:
    """Ends every process that unpickles it, but this one."""

    def __reduce__(self):
        return (eval, (f"__import__('os').getpid() != {os.getpid()} and __import__('os')._exit(1)",))


def test_a_row_that_ends_its_worker_each_time_costs_no_other_row(cluster, monkeypatch):
    monkeypatch.setattr("zimage_core.batch.ray.WINDOW", 2)  # so that there are two windows
    rows = [Row(i, f"{i:064}", {"prompt": "a red circle", "seed": i}) for i in range(1, 7)]
    rows[1] = Row(2, "2", {"prompt": "a red circle", "seed": Deadly()})
    with Pool(Spec(Model(device="cpu")), cluster) as pool:
        found = {result.row.number: result for result in pool.results(rows)}
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert [number for number, result in found.items() if isinstance(result, Failed)] == [2]
    assert "3 times" in found[2].reason


def test_a_model_that_a_node_cannot_load_ends_the_run_with_its_sentence(cluster, tmp_path):
    missing = Spec(Model(model=str(tmp_path / "missing"), device="cpu"))
    with Pool(missing, cluster) as pool, pytest.raises(ZImageError, match="missing"):
        list(pool.results([Row(1, "1", {"prompt": "a red circle", "seed": 1})]))


def test_a_cluster_is_left_running(cluster):
    with Pool(Spec(), cluster) as pool:
        assert pool.spec.model.device == "cpu"
    assert not ray.is_initialized()
    with Pool(Spec(), cluster):
        assert ray.is_initialized()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_worker_and_goes_on_from_there(tmp_path, end):
    table, out = tmp_path / "rows.jsonl", tmp_path / "out"
    table.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [sys.executable, "-m", "zimage_core", "batch", str(table), str(out), "--ray"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        wait(lambda: len(list(out.glob("*.png"))) >= 3 or run.poll() is not None)
        below = processes(run.pid)
        drawing = [pid for pid in below if title(pid).startswith("ray::MapWorker")]
        os.kill(run.pid, end)
        shown = "".join(run.communicate())
    assert run.returncode == (-end if end == signal.SIGKILL else 130)
    assert "Traceback" not in shown
    assert "ray::" not in shown
    assert drawing
    # after kill -9, two helpers of Ray need a minute to notice that they are alone
    ended = drawing if end == signal.SIGKILL else below
    wait(lambda: not any(title(pid) for pid in ended))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 3 <= len(before) < len(ROWS)

    report = generate_dataset(table, out)
    assert report.skipped >= len(before)
    assert report.made + report.skipped == len(ROWS)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())
    generate_dataset(table, tmp_path / "once")
    assert contents(out) == contents(tmp_path / "once")


def wait(done) -> None:
    """Wait until something is so."""
    end = time.monotonic() + GUARD
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
