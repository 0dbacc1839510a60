"""The tables of docs/quantizing.md, between their markers, from the raw figures of two scripts.

python -m benchmarks.quantize_table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, fill_tables
from zimage_core.quantize.encode import ENCODERS

PAGE = Path("docs/quantizing.md")
KINDS = ("gaussian", "student", "real")
ROWS = 1024


def errors(rows: list[dict[str, Any]]) -> str:
    """A row a type: error of each kind of weights and the ratio to ggml's, without and with importance."""
    found = {(r["format"], r["weights"], r["importance"]): r for r in rows}
    lines = [
        "| type | Gaussian | Student-t | SmolLM2 | Gaussian, importance | Student-t, importance "
        "| SmolLM2, importance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["format"] for row in rows):
        cells = [_error(found[name, kind, costs]) for costs in (False, True) for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ones(rows: list[dict[str, Any]]) -> str:
    """What the search gives the types that are ggml's bytes without importance."""
    found = {(r["format"], r["weights"]): r for r in rows if r.get("ours_ones") is not None}
    lines = ["| type, matrix of ones | Gaussian | Student-t | SmolLM2 |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [f"{r['ours_ones']:.4f} ({r['ratio_ones']:.3f})" for r in (found[name, k] for k in KINDS)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(rows: list[dict[str, Any]]) -> str:
    """A row a type: MB/s of wall time on all threads, and ggml's on its one."""
    found = {(r["format"], r["rows"], r["importance"], r["by"], r["threads"]): r for r in rows}
    most = max(r["threads"] for r in rows)
    lines = [
        f"| type | ours, {most} threads | ours, one | ggml, one | ours, {most} threads, importance "
        "| ours, one | ggml, one |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {row["format"] for row in rows}
    for name in [name for name in ENCODERS if name in names]:
        cells = []
        for costs in (False, True):
            for by, threads in (("ours", most), ("ours", 1), ("ggml", 1)):
                sizes = [n for n, *key in ((r["rows"], r["format"], r["importance"], r["by"]) for r in rows)
                         if key == [name, costs, by]]  # fmt: skip
                rows_of = ROWS if ROWS in sizes else min(sizes, default=0)
                row = found.get((name, rows_of, costs, by, threads))
                cells.append("-" if row is None else _rate(row["wall"]["median"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recipes(report: dict[str, Any]) -> str:
    """A row for each size and way to choose types."""
    lines = [
        "| size of | types by | file | velocity | PSNR, dB | SSIM | right |",
        "|---|---|---|---|---|---|---|",
    ]
    for mix, size in report["sizes"].items():
        for how, row in size["choices"].items():
            lines.append(
                f"| {mix} | {how} | {row['bytes'] / 1e6:.2f} MB | {100 * row['velocity']:.2f} % "
                f"| {row['psnr']:.1f} | {row['ssim']:.4f} | {row['right']} of {row['of']} |"
            )
    return "\n".join(lines)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _error(row: dict[str, Any]) -> str:
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
    return f"{row['ours']:.4f} ({ratio})"


def main() -> None:
    """Fill the page."""
    tables = json.loads((RESULTS / "quantize_errors.json").read_text("utf-8"))["errors"]
    times = json.loads((RESULTS / "quantize_speed.json").read_text("utf-8"))["speed"]
    found = json.loads((RESULTS / "recipe_search.json").read_text("utf-8"))
    fill_tables(
        PAGE,
        {"errors": errors(tables), "ones": ones(tables), "speed": speed(times), "recipes": recipes(found)},
    )


if __name__ == "__main__":
    main()
