"""The tables of docs/quality.md, between their markers, from benchmarks/results/quality.json.

python -m benchmarks.quality_table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, fill_tables
from zimage_core.formats import by_name

PAGE = Path("docs/quality.md")
IMAGE = Path("docs/images/quality.png")


def bits(fmt: str) -> float:
    """Stored bits of a weight."""
    block = by_name(fmt)
    return 8 * block.nbytes / block.weights


def nano(report: dict[str, Any]) -> str:
    """A row a type, the most bits first; each cell without / with the importance matrix."""
    results = report["results"]
    lines = [
        "| type | bits | file | weights | velocity | PSNR, dB | SSIM | right |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fmt in sorted((n for n in results if "+" not in n), key=lambda n: (-bits(n), n)):
        pair = [results[fmt], *([results[f"{fmt}+imatrix"]] if f"{fmt}+imatrix" in results else [])]
        cells = [
            _cells(pair, "weights", lambda v: f"{100 * v:.3g} %"),
            _cells(pair, "velocity", lambda v: f"{100 * v:.3g} %"),
            _cells(pair, "psnr", lambda v: "equal" if v is None else f"{v:.1f}"),
            _cells(pair, "ssim", lambda v: f"{v:.4f}"),
            " / ".join(f"{100 * r['right'] / r['of']:.0f} %" for r in pair),
        ]
        lines.append(f"| {fmt} | {bits(fmt):.4g} | {pair[0]['bytes'] / 1e6:.2f} MB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(pair: list[dict[str, Any]], key: str, shown: Any) -> str:
    return " / ".join(shown(result[key]) for result in pair)


def full(report: dict[str, Any]) -> str:
    """A row a type: size of a 6B file and error of random weights of its shapes."""
    lines = ["| type | bits | 6B file | Gaussian | Student's t |", "| --- | --- | --- | --- | --- |"]
    for fmt, row in sorted(report["random"].items(), key=lambda item: (-bits(item[0]), item[0])):
        errors = f"{100 * row['gauss']:.3g} % | {100 * row['student']:.3g} %"
        lines.append(f"| {fmt} | {bits(fmt):.4g} | {row['bytes'] / 1e9:.2f} GB | {errors} |")
    return "\n".join(lines)


def fill(page: Path, report: dict[str, Any]) -> None:
    """Put both tables into the page."""
    fill_tables(page, {"nano": nano(report), "full": full(report)})


if __name__ == "__main__":
    fill(PAGE, json.loads((RESULTS / "quality.json").read_text("utf-8")))
