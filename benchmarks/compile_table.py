"""The table of counts in docs/kernels.md, from results/compile_matrix.csv.

python -m benchmarks.compile_table
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.report import RESULTS

DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- counts: python -m benchmarks.compile_table -->", "<!-- end of counts -->"
FEW, MANY = "32x64", "128x"
Rows = list[dict[str, str]]


def table(rows: Rows) -> list[str]:
    """Lines of Markdown."""
    targets = sorted({row["target"] for row in rows})
    lines = [
        f"{len(rows):,} cells (kernel, format, dtype, tile, target) with Triton {rows[0]['triton']}: "
        f"{sum(bool(row['failure']) for row in rows)} failures, "
        f"{sum(row['spills'] != '0' or row['stack'] != '0' for row in rows)} with spills or stack; "
        f"targets {', '.join(targets)}.",
        "",
        "Instructions of a thread for each weight: all of the dequantising kernel, the loop of the fused one "
        "(tiles of 32 rows, and of 128).",
        "",
        "| format | dequantise sm_89 | sm_90 | fused 32, sm_89 | fused 32, sm_90 | fused 128, sm_90 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["format"] for row in rows if row["kernel"] == "dequantize"):
        mine = [row for row in rows if row["format"] == name and row["dtype"] == "bfloat16"]
        dense = [_only(r["instructions"] for r in _of(mine, "dequantize", t)) for t in ("sm_89", "sm_90")]
        cells = [f"{int(count) / 16:.1f}" for count in dense]
        for target, tile in (("sm_89", FEW), ("sm_90", FEW), ("sm_90", MANY)):
            found = [r["per_weight"] for r in _of(mine, "matmul", target) if r["tile"].startswith(tile)]
            cells.append(f"{float(_only(found)):.1f}" if found else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| fused kernel, worst cell | registers | shared memory |", "| --- | --- | --- |"]
    for target in targets:
        fused = [row for row in rows if row["kernel"] == "matmul" and row["target"] == target]
        if fused:
            registers, shared = (max(int(row[key]) for row in fused) for key in ("registers", "shared"))
            lines.append(f"| {target} | {registers} | {shared / 1024:.0f} KiB |")
    return lines


def _of(rows: Rows, kernel: str, target: str) -> Rows:
    return [row for row in rows if row["kernel"] == kernel and row["target"] == target]


def _only(values: Iterable[str]) -> str:
    return next(iter(values))


def read() -> Rows:
    """The committed matrix."""
    with (RESULTS / "compile_matrix.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def updated(page: str, rows: Rows) -> str:
    """The page with the table between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN, "", *table(rows), "", END]) + tail


def main() -> None:
    """Rewrite docs/kernels.md."""
    DOCS.write_text(updated(DOCS.read_text("utf-8"), read()), "utf-8")


if __name__ == "__main__":
    main()
