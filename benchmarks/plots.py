"""Pictures of result files: roofline, crossover over M, bandwidth by format.

    python -m benchmarks.plots benchmarks/results/gpu_part*.csv [--out FOLDER]

Needs matplotlib (`pip install zimage-core[bench]`). A picture is drawn where the rows hold something for it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, read

Rows = Sequence[Mapping[str, Any]]


def _axes() -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, 5), layout="constrained")


def _ceiling(rows: Rows, case: str, column: str) -> float:
    return max((row[column] for row in rows if row["what"] == "ceiling" and row["case"] == case), default=0.0)


def _timed(rows: Rows, what: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["what"] == what and row["median_us"] != ""]


def roofline(rows: Rows) -> Any:
    """TFLOP/s against FLOP a byte, below the two measured ceilings; None without products."""
    products = [row for row in rows if row["tflops"] not in ("", 0) and row["gbps"] not in ("", 0)]
    products = [row for row in products if row["median_us"] != ""]
    copy, peak = _ceiling(rows, "copy", "gbps"), _ceiling(rows, "matmul", "tflops")
    if not products or not copy or not peak:
        return None
    figure, axes = _axes()
    series = defaultdict(list)
    for row in products:
        series[f"{row['what']} {row['contestant']}"].append(
            (row["tflops"] * 1e3 / row["gbps"], row["tflops"])
        )
    for name, points in sorted(series.items()):
        axes.plot(*zip(*sorted(points), strict=True), "o", markersize=4, label=name)
    intensities = [x for points in series.values() for x, _ in points] + [peak * 1e3 / copy]
    low, high = min(intensities) / 2, max(intensities) * 2
    knee = peak * 1e3 / copy
    axes.plot([low, knee, high], [low * copy / 1e3, peak, peak], "k-", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.set_title(f"copy {copy:.0f} GB/s, product {peak:.1f} TFLOP/s, both measured")
    axes.legend(fontsize=7)
    return figure


def crossover(rows: Rows) -> Any:
    """Time of each contestant over M, for the first format and shape that has several; None without."""
    groups = defaultdict(list)
    for row in _timed(rows, "matmul"):
        groups[row["case"], row["format"]].append(row)
    several = [key for key, found in groups.items() if len({row["m"] for row in found}) > 1]
    if not several:
        return None
    key = max(several, key=lambda k: len({row["m"] for row in groups[k]}))
    figure, axes = _axes()
    series = defaultdict(list)
    for row in groups[key]:
        series[row["contestant"]].append((row["m"], row["median_us"], row["p20_us"], row["p80_us"]))
    for name, points in series.items():
        m, median, low, high = zip(*sorted(points), strict=True)
        axes.plot(m, median, "o-", markersize=4, label=name)
        axes.fill_between(m, low, high, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="us, p20 to p80")
    axes.set_title(f"{key[0]} {key[1]}")
    axes.legend(fontsize=8)
    return figure


def bandwidth(rows: Rows) -> Any:
    """GB/s of dequantising by format beside the measured copy; None without such rows."""
    found = _timed(rows, "dequant")
    if not found:
        return None
    case = found[0]["case"]
    found = [row for row in found if row["case"] == case]
    formats = list(dict.fromkeys(row["format"] for row in found))
    contestants = list(dict.fromkeys(row["contestant"] for row in found))
    figure, axes = _axes()
    width = 0.8 / len(contestants)
    for i, name in enumerate(contestants):
        heights = {row["format"]: row["gbps"] for row in found if row["contestant"] == name}
        places = [j + i * width for j, fmt in enumerate(formats) if fmt in heights]
        axes.bar(places, [heights[fmt] for fmt in formats if fmt in heights], width, label=name)
    copy = _ceiling(rows, "copy", "gbps")
    if copy:
        axes.axhline(copy, color="k", linewidth=1, label="copy")
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(formats))], formats, rotation=60, fontsize=8)
    axes.set(ylabel="GB/s, read and written", title=f"dequantising {case}")
    axes.legend(fontsize=8)
    return figure


PICTURES = {"roofline": roofline, "crossover": crossover, "bandwidth": bandwidth}


def draw(rows: Rows, folder: Path, stem: str) -> list[Path]:
    """Write every picture that the rows hold something for; their paths."""
    written = []
    for name, picture in PICTURES.items():
        figure = picture(rows)
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stem}_{name}.png"
        figure.savefig(path, dpi=120)
        figure.clear()
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="CSV files of one device")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="first part of the file names; default that of the first file")
    given = parser.parse_args(argv)
    rows = [row for path in given.files for row in read(path)]
    for path in draw(rows, given.out, given.name or given.files[0].stem):
        print(path.name)


if __name__ == "__main__":
    main()
