"""Find the tiles of the fused product for this GPU and write them into kernels/tiles.json.

    python -m benchmarks.tune [--rows 16 32 64 128] [--format Q4_K] [--limit 480] [--dry]

Every tile is checked against float64 first. It is then timed on the matrices of a block, and the one with the
least time over all of them, each as often as a block has it, wins its number of rows. Entries of this
architecture are replaced; those of others stay as they are. Kernels never tune themselves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import cases
from benchmarks.timing import Budget, copies, measure, warm_up
from benchmarks.variants import short
from benchmarks.weights import packed_matrix, product_error
from zimage_core.files.atomic import write_atomically
from zimage_core.formats import FORMATS, BlockFormat

ROWS = (16, 32, 64, 128)
ANY = 1 << 20
"""Rows of the last entry, which serves all that are taller."""
LIMIT = 1e-2
QUICK, LONG = Budget(3, 0.0, 2.0), Budget(15, 0.1, 5.0)
FINALISTS = 4
NO_GPU = "tiles are tuned on the GPU that runs them, and there is none here"


class Candidate(NamedTuple):
    """One tile, as an entry of tiles.json has it."""

    bm: int
    bn: int
    warps: int
    stages: int


@dataclass
class Problem:
    """One matrix in one format, with inputs in rotation."""

    fmt: BlockFormat
    n: int
    k: int
    count: int
    x: torch.Tensor
    planes: list[Any]


def candidates(rows: int, arch: str) -> list[Candidate]:
    """Tiles worth trying for `rows` rows of x: no taller than that, their sums in registers.

    The one of the table comes first and the others in a mixed order, so that a search which runs out of
    time has seen of everything. On AMD two stages alone: Triton's compiler has crashed at more.
    """
    from zimage_core.kernels import tiles

    tall = [bm for bm in (16, 32, 64, 128, 256) if bm <= max(16, rows)][-3:]
    stages = (2,) if arch.startswith("gfx") else (2, 3, 4, 5)
    # float32 sums of a tile: at most 128 registers a thread; and at least one row of a tensor-core fragment
    found = [
        Candidate(*sizes)
        for sizes in itertools.product(tall, (32, 64, 128, 256), (4, 8), stages)
        if 4 <= sizes[0] * sizes[1] // (32 * sizes[2]) <= 128
    ]
    random.Random(0).shuffle(found)
    now = tiles.matmul_tile(rows, arch)
    present = Candidate(*(getattr(now, name) for name in Candidate._fields))
    return [present, *(one for one in found if one != present)]


def problems(formats: Sequence[str], rows: int, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """The matrices of a block in each format."""
    from zimage_core.kernels.planar import can_repack, repack

    found = []
    block = [c for c in cases.block_linears() if c.name.startswith("layers.")]
    for name, case in itertools.product(formats, block):
        fmt = FORMATS[name]
        if not can_repack(fmt, case.k):
            raise SystemExit(f"{name} has no planes at K = {case.k}: the fused product does not take it")
        packed = packed_matrix(name, case.n, case.k, device).contiguous()
        rotation = copies(packed.numel(), device)
        planes = [repack(packed, fmt) for _ in range(rotation)]
        x = torch.randn(rows, case.k, device=device).to(dtype)
        count = case.count // cases.TRANSFORMER.n_layers
        found.append(Problem(fmt, case.n, case.k, count, x, planes))
    return found


@contextmanager
def forced(candidate: Candidate) -> Iterator[None]:
    """Every fused product takes this tile; splits along K follow the usual rule."""
    from zimage_core.kernels import tiles

    tile = tiles.Tile(*candidate)
    before = tiles.matmul_tile
    tiles.matmul_tile = lambda count, arch: tile
    try:
        yield
    finally:
        tiles.matmul_tile = before


def seconds(candidate: Candidate, found: Sequence[Problem], budget: Budget, check: bool) -> float | None:
    """Seconds of a block's products with this tile, None where it is wrong or does not run."""
    from zimage_core.kernels.matmul import matmul

    total = 0.0
    with forced(candidate), torch.no_grad():
        for one in found:
            try:
                if check:
                    y = matmul(one.x, one.planes[0], one.fmt, one.n)
                    error = product_error(y, one.x, one.fmt.name, one.n)
                    if not error <= LIMIT:
                        print(f"  {candidate}: refused, error {error:.1e} on {one.fmt.name}", flush=True)
                        return None

                def call(i: int, one: Problem = one) -> torch.Tensor:
                    return matmul(one.x, one.planes[i], one.fmt, one.n)

                timed = measure({"fused": call}, one.x.device, budget, len(one.planes), {"fused": True})
            except Exception as error:  # noqa: BLE001 - too much shared memory, a compiler that gives up
                print(f"  {candidate}: {short(error)}", flush=True)
                return None
            total += timed["fused"].median * one.count
    return total


def best(rows: int, arch: str, found: Sequence[Problem], end: float) -> tuple[Candidate, float] | None:
    """The winner for `rows` rows and its seconds; None where none ran before `end`."""
    scores = {}
    for candidate in candidates(rows, arch):
        if time.monotonic() > end:
            print("  out of time, the rest is not tried", flush=True)
            break
        score = seconds(candidate, found, QUICK, check=True)
        if score is not None:
            scores[candidate] = score
    finalists = sorted(scores, key=scores.__getitem__)[:FINALISTS]
    final = {one: score for one in finalists if (score := seconds(one, found, LONG, check=False))}
    if not final:
        return None
    winner = min(final, key=final.__getitem__)
    for one, score in sorted(final.items(), key=lambda item: item[1]):
        print(f"  {one}: {score * 1e6:.1f} us a block", flush=True)
    return winner, final[winner]


def entries(found: Mapping[int, Candidate]) -> list[dict[str, int]]:
    """Entries of one architecture, by rising rows; the tallest serves everything above."""
    tallest = max(found)
    return [{"rows": ANY if rows == tallest else rows, **found[rows]._asdict()} for rows in sorted(found)]


def as_text(table: Mapping[str, Sequence[Mapping[str, int]]]) -> str:
    """tiles.json, one tile a line."""
    blocks = []
    for arch, listed in table.items():
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in listed)
        blocks.append(f" {json.dumps(arch)}: [\n{lines}\n ]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def write(path: Path, arch: str, listed: list[dict[str, int]]) -> None:
    """Replace the entries of one architecture, in one step."""
    table = json.loads(path.read_text("utf-8"))
    table[arch] = listed
    write_atomically(path, as_text(table).encode(), overwrite=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS), help="tops of the row buckets")
    parser.add_argument("--format", nargs="*", choices=FORMATS, default=["Q4_K"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--limit", type=float, default=480, help="seconds for all rows together")
    parser.add_argument(
        "--tall", type=int, default=cases.stages()[0][1], help="rows that the last is timed at"
    )
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    parser.add_argument("--out", type=Path, help="table to write; default kernels/tiles.json")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    from zimage_core.kernels import tiles

    device = torch.device("cuda", torch.cuda.current_device())
    arch, _ = tiles.architecture(device)
    dtype = getattr(torch, given.dtype)
    warm_up(device)
    begin, winners = time.monotonic(), {}
    wanted = sorted(set(given.rows))
    for done, rows in enumerate(wanted):
        # the last bucket is for everything taller, so it is tuned at the rows of an image
        timed_at = given.tall if rows == wanted[-1] else rows
        share = (given.limit - (time.monotonic() - begin)) / (len(wanted) - done)
        print(f"{arch}, {timed_at} rows, {share:.0f} s:", flush=True)
        found = problems(given.format, timed_at, device, dtype)
        winner = best(timed_at, arch, found, time.monotonic() + share)
        if winner is None:
            print(f"  no tile ran for {timed_at} rows; the table keeps what it has", flush=True)
            return
        winners[rows] = winner[0]
        torch.cuda.empty_cache()
    listed = entries(winners)
    print(as_text({arch: listed}), end="")
    if not given.dry:
        write(given.out or tiles.TABLE, arch, listed)
        tiles._table.cache_clear()


if __name__ == "__main__":
    main()
