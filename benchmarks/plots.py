"""Plots of result files: roofline, crossover over M, bandwidth by format, parts of a step.

    python -m benchmarks.plots benchmarks/results/gpu_part*.csv [--out FOLDER]

Needs matplotlib (`pip install zimage-core[bench]`). A plot is drawn where the rows hold something for it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import standing, step_model
from benchmarks.records import read
from benchmarks.report import RESULTS
from benchmarks.step_model import Gpu

Rows = Sequence[Mapping[str, Any]]


def _grouped(rows: Rows, *columns: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[column] for column in columns)].append(row)
    return found


def _ceiling(rows: Rows, case: str, column: str) -> float:
    return max((row[column] for row in rows if row["what"] == "ceiling" and row["case"] == case), default=0.0)


def roofline(rows: Rows, axes: Any) -> bool:
    """TFLOP/s against FLOP a byte, below the two measured ceilings; whether there are products."""
    products = [row for row in rows if row["tflops"] and row["gbps"] and row["median_us"] != ""]
    copy, peak = _ceiling(rows, "copy", "gbps"), _ceiling(rows, "matmul", "tflops")
    if not products or not copy or not peak:
        return False
    knee = peak * 1e3 / copy
    intensities = [knee]
    for name, found in sorted(_grouped(products, "what", "variant").items()):
        points = sorted((row["tflops"] * 1e3 / row["gbps"], row["tflops"]) for row in found)
        axes.plot(*zip(*points, strict=True), "o", markersize=4, label=" ".join(name))
        intensities += [x for x, _ in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    axes.plot([low, knee, high], [low * copy / 1e3, peak, peak], "k-", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.set_title(f"copy {copy:.0f} GB/s, product {peak:.1f} TFLOP/s, both measured")
    return True


def crossover(rows: Rows, axes: Any) -> bool:
    """Time of each variant over M, for the format and shape with the most; whether one has several."""
    products = [row for row in rows if row["what"] == "matmul" and row["median_us"] != ""]
    groups = _grouped(products, "case", "format")
    key = max(groups, key=lambda each: len({row["m"] for row in groups[each]}), default=None)
    if key is None or len({row["m"] for row in groups[key]}) < 2:
        return False
    for (name,), found in _grouped(groups[key], "variant").items():
        points = sorted((row["m"], row["median_us"], row["p20_us"], row["p80_us"]) for row in found)
        m, median, low, high = zip(*points, strict=True)
        axes.plot(m, median, "o-", markersize=4, label=name)
        axes.fill_between(m, low, high, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="us, p20 to p80", title=" ".join(key))
    return True


def bandwidth(rows: Rows, axes: Any) -> bool:
    """GB/s of dequantising by format beside the measured copy; whether there are such rows."""
    found = [row for row in rows if row["what"] == "dequant" and row["median_us"] != ""]
    if not found:
        return False
    found = [row for row in found if row["case"] == found[0]["case"]]
    formats = list(dict.fromkeys(row["format"] for row in found))
    groups = _grouped(found, "variant")
    width = 0.8 / len(groups)
    for i, ((name,), mine) in enumerate(groups.items()):
        places = [formats.index(row["format"]) + i * width for row in mine]
        axes.bar(places, [row["gbps"] for row in mine], width, label=name)
    axes.axhline(_ceiling(rows, "copy", "gbps"), color="k", linewidth=1, label="copy")
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(formats))], formats, rotation=60, fontsize=8)
    axes.set(ylabel="GB/s, read and written", title=f"dequantising {found[0]['case']}")
    return True


def parts(rows: Rows, axes: Any, gpu: Gpu = step_model.MAIN) -> bool:
    """Milliseconds of a 1024 px step by part, predicted and measured; whether all were measured.

    Lines at the predicted bars are the ranges of the parts.
    """
    cost = step_model.step(gpu)
    predicted = {
        "linears": cost.linears,
        "attention": cost.attention[step_model.CUDNN],
        "dequantise": cost.dequantise,
        "element-wise": cost.elementwise,
        "gaps": cost.gaps,
    }
    rest = standing.gaps(rows)
    if rest is None:
        return False
    measured = {name: standing.part(rows, name) for name in standing.PARTS} | {"gaps": rest}
    bottoms = [0.0, 0.0]
    for name, found in predicted.items():
        heights = [1e3 * found.middle, measured[name] or 0.0]
        spread = [1e3 * (found.high - found.low) / 2, 0.0]
        axes.bar([f"predicted, {gpu.name}", "measured"], heights, 0.5, bottoms, yerr=spread, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set(ylabel="ms", title="a step at 1024 px, Q4_K")
    return True


def _gpu(path: Path) -> Gpu:
    """The card of a result file where the model knows it, else the model's main one."""
    about = path.with_suffix(".json")
    name = json.loads(about.read_text("utf-8"))["machine"]["gpu"] if about.exists() else None
    return step_model.gpu_named(name or "") or step_model.MAIN


def main(argv: Sequence[str] | None = None) -> None:
    """Write every plot that the rows hold something for, and print its name."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="CSV files of one device")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="first part of the file names; default that of the first file")
    given = parser.parse_args(argv)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [row for path in given.files for row in read(path)]
    given.out.mkdir(parents=True, exist_ok=True)
    drawn = {"roofline": roofline, "crossover": crossover, "bandwidth": bandwidth}
    drawn["parts"] = partial(parts, gpu=_gpu(given.files[0]))
    for name, plot in drawn.items():
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        if plot(rows, axes):
            axes.legend(fontsize=8)
            path = given.out / f"{given.name or given.files[0].stem}_{name}.png"
            figure.savefig(path, dpi=120)
            print(path.name)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
