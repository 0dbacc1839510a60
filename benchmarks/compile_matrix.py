"""Every kernel, format, dtype and tile compiled for every GPU architecture, on a machine without a GPU.

    python -m benchmarks.compile_matrix [--kernel matmul] [--format Q4_K] [--dtype bfloat16] [--target sm_90]

The exit status is 1 if a cell does not compile, spills, exceeds the card's shared memory, or multiplies
without tensor cores. A whole matrix is written to results/compile_matrix.csv, of which `python -m
benchmarks.tables` makes the table in docs/explanation/kernels.md. Compilers run in processes of their own:
one that crashes takes only its process along.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, get_type_hints

import triton

from benchmarks.compile_cell import FIELDS, HALVES, KERNELS, TARGETS, Cell, Row, cells, judge, measure, name
from benchmarks.report import RESULTS
from zimage_core.kernels import tiles
from zimage_core.kernels.decode.table import DECODERS

OUT = RESULTS / "compile_matrix.csv"
PATIENCE = 900
"""Seconds after which a compiler is given up."""


def serve(pipe: Connection, cache: str, log: str) -> None:
    """Compile what comes through the pipe. What the compiler prints, modules of MLIR too, goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["TRITON_CACHE_DIR"] = cache
    while (cell := pipe.recv()) is not None:
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        try:
            row = measure(cell)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is a cell's result
            row = Row(failure=one_line(f"{type(error).__name__}: {error}", Path(log)))
        pipe.send(row)
        shutil.rmtree(cache, ignore_errors=True)


def one_line(said: str, log: Path) -> str:
    """The first error that the compiler printed, or the exception, on one line."""
    printed = log.read_text("utf-8", errors="replace") if log.exists() else ""
    errors = re.findall(r"error: (.*)|(.*Assertion .*failed.*)|(LLVM ERROR.*)", printed)
    first = next((part for group in errors for part in group if part), "")
    return " ".join(f"{said} {first}".split())[:200]


class Worker:
    """A process that compiles; started again after a crash."""

    def __init__(self, folder: Path, index: int):
        self.log = folder / f"log{index}"
        self.cache = folder / f"cache{index}"
        self.process: Any = None
        self.pipe: Any = None

    def __call__(self, cell: Cell) -> Row:
        """Compile a cell; a crash and a hang are results too."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, end = context.Pipe()
            self.process = context.Process(
                target=serve, args=(end, str(self.cache), str(self.log)), daemon=True
            )
            self.process.start()
            end.close()
        try:
            self.pipe.send(cell)
            if self.pipe.poll(PATIENCE):
                row: Row = self.pipe.recv()
                return row
            self.stop()
            return Row(failure=f"not compiled after {PATIENCE} s")
        except (EOFError, OSError):
            self.process.join()
            status = self.process.exitcode
            self.stop()
            return Row(failure=one_line(f"the compiler died with status {status}:", self.log))

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def compile_all(wanted: Iterable[Cell], jobs: int, seen: Callable[[Cell, Row], None]) -> None:
    """Compile cells in `jobs` processes; `seen` hears of each, one at a time."""
    queue: SimpleQueue[Cell] = SimpleQueue()
    for cell in wanted:
        queue.put(cell)
    one = Lock()

    def drain(worker: Worker) -> None:
        try:
            while True:
                cell = queue.get_nowait()
                row = worker(cell)
                with one:
                    seen(cell, row)
        except Empty:
            return
        finally:
            worker.stop()

    with tempfile.TemporaryDirectory(prefix="compile_matrix_") as folder, ThreadPoolExecutor(jobs) as pool:
        list(pool.map(drain, [Worker(Path(folder), i) for i in range(jobs)]))


def read(path: Path) -> dict[Cell, Row]:
    """The cells of a written matrix."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = get_type_hints(Row)
    return {
        Cell(*(row[name] for name in Cell._fields)): Row(
            **{name: kind(row[name]) for name, kind in numbers.items()}
        )
        for row in rows
    }


def write(path: Path, found: dict[Cell, Row]) -> None:
    """One line a cell, sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(FIELDS)
        for cell in sorted(found, key=lambda cell: (*cell[:4], TARGETS.index(cell.target))):
            lines.writerow([*cell, *vars(found[cell]).values(), triton.__version__])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", nargs="*", choices=KERNELS, default=KERNELS)
    parser.add_argument("--format", nargs="*", choices=DECODERS, help="leaves kernels without a format in")
    parser.add_argument("--dtype", nargs="*", choices=("float32", *HALVES), help="and those without a dtype")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=TARGETS)
    parser.add_argument(
        "--out", type=Path, help=f"default for a whole matrix: {OUT.name}; a part is not written"
    )
    parser.add_argument("--resume", action="store_true", help="after an interruption: keep the cells written")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    return parser.parse_args(arguments)


def selected(given: argparse.Namespace) -> list[Cell]:
    """The cells that a command line asks for."""
    return [
        cell
        for cell in cells()
        if cell.kernel in given.kernel
        and cell.target in given.target
        and (not given.format or cell.format in (*given.format, ""))
        and (not given.dtype or cell.dtype in (*given.dtype, ""))
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compile what the command line asks for."""
    given = parse(arguments)
    if tiles.interpreted():
        print("TRITON_INTERPRET is set, so there is nothing to compile: unset it.", file=sys.stderr)
        return 2
    wanted = selected(given)
    every = set(cells())
    out = given.out or (OUT if len(wanted) == len(every) else None)
    start = time.monotonic()
    found: dict[Cell, Row] = {}
    if given.resume and out and out.exists():
        found = {cell: row for cell, row in read(out).items() if cell in every}
    left = [cell for cell in wanted if cell not in found]

    def seen(cell: Cell, row: Row) -> None:
        found[cell] = row
        for fault in judge(cell, row):
            print(f"{name(cell)}: {fault}", flush=True)
        if out and len(found) % 50 == 0:
            write(out, found)

    compile_all(left, given.jobs, seen)
    if out:
        write(out, found)
    faults = [cell for cell in wanted if judge(cell, found[cell])]
    print(
        f"triton {triton.__version__}: {len(left)} cells in {time.monotonic() - start:.0f} s, "
        f"{len(faults)} of them at fault"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
