"""The standing figures: what is aimed at, what the model predicts, what was last measured.

`standing.json` holds aims and measurements, `predictions.py` computes the predictions, and the table in
README.md is made from both. A value comes out of the rows of result files alone, so it can be had again from
the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, predictions
from benchmarks.predictions import FEW, MAIN, MANY, SHAPE, SMALL
from benchmarks.records import read
from benchmarks.report import fill_tables, markdown
from zimage_core.files.atomic import write_atomically

DATA = Path(__file__).parent / "standing.json"
README = Path(__file__).parent / "README.md"

Rows = Sequence[Mapping[str, Any]]
PARTS = ("linears", "attention", "dequantise", "element-wise")
"""Parts whose times add up to a step without its gaps; `attention` is the package's."""
LITTLE = cases.stages(SMALL)[0][1]
"""Rows of x in a step at 512 px."""


def _pick(rows: Rows, variant: str, column: str = "median_us", **where: Any) -> float | None:
    """One number of the last row that fits and was timed."""
    for row in reversed(rows):
        fits = all(row.get(name) == value for name, value in where.items())
        if fits and row["variant"] == variant and row["median_us"] != "" and row[column] != "":
            return float(row[column])
    return None


def _over(first: float | None, second: float | None) -> float | None:
    return first / second if first is not None and second else None


def _dequantise(rows: Rows, name: str) -> float | None:
    """Per cent of the measured copy bandwidth."""
    share = _pick(rows, "kernel", "of_ceiling", what="dequant", case=SHAPE, format=name)
    return None if share is None else 100 * share


def _others(rows: Rows) -> float | None:
    names = {row["format"] for row in rows if row["what"] == "dequant"} - set(MAIN)
    found = [share for name in names if (share := _dequantise(rows, name)) is not None]
    return min(found, default=None)


def _product(rows: Rows, variant: str, m: int, column: str = "median_us") -> float | None:
    return _pick(rows, variant, column, what="matmul", case=SHAPE, format="Q4_K", m=m)


def crossover(rows: Rows) -> float | None:
    """Rows of x at which both ways take the same time, between the two measured points around it."""
    counts = sorted({row["m"] for row in rows if row["what"] == "matmul" and row["m"] != ""})
    before: tuple[int, float] | None = None
    for m in counts:
        ratio = _over(_product(rows, "fused", m), _product(rows, "dequantise + matmul", m))
        if ratio is None:
            continue
        if ratio >= 1:
            if before is None:
                return float(m)
            share = -math.log(before[1]) / (math.log(ratio) - math.log(before[1]))
            return math.exp(math.log(before[0]) + share * (math.log(m) - math.log(before[0])))
        before = (m, ratio)
    return None


def _compared(rows: Rows, first: str, second: str, m: int = MANY, **where: Any) -> float | None:
    """Time of one variant over another's, by default at 1024 px."""
    return _over(_pick(rows, first, m=m, **where), _pick(rows, second, m=m, **where))


def part(rows: Rows, variant: str) -> float | None:
    """Milliseconds of one part of a step at 1024 px, see `part_cases`."""
    return _over(_pick(rows, variant, what="parts", format="Q4_K", m=MANY), 1e3)


def gaps(rows: Rows) -> float | None:
    """Milliseconds of a replayed step that its parts, each as a graph of its own, do not account for."""
    whole, *parts = (part(rows, name) for name in ("whole", *PARTS))
    return None if whole is None or None in parts else whole - sum(each or 0.0 for each in parts)


def _step(m: int, member: str = "packed") -> Callable[[Rows], float | None]:
    return lambda rows: _over(_pick(rows, f"{member} replayed", what="step", format="Q4_K", m=m), 1e3)


def _eager(m: int) -> Callable[[Rows], float | None]:
    return lambda rows: _compared(rows, "packed", "packed replayed", m, what="step", format="Q4_K")


def _elementwise(name: str) -> Callable[[Rows], float | None]:
    return lambda rows: _compared(rows, "torch", "kernel", what="elementwise", case=name)


def _attention(variant: str) -> Callable[[Rows], float | None]:
    """Time of one of the package's ways over that of the fastest backend of torch."""

    def found(rows: Rows) -> float | None:
        names = {row["variant"] for row in rows if row["what"] == "attention"} - {"nn.attention", "int8"}
        ratios = [_compared(rows, variant, name, what="attention") for name in names]
        return max((ratio for ratio in ratios if ratio is not None), default=None)

    return found


FIGURES: dict[str, Callable[[Rows], float | None]] = {
    "dequantise_q4_k": lambda rows: _dequantise(rows, "Q4_K"),
    "dequantise_q4_k_us": lambda rows: _pick(rows, "kernel", what="dequant", case=SHAPE, format="Q4_K"),
    "dequantise_q6_k": lambda rows: _dequantise(rows, "Q6_K"),
    "dequantise_q8_0": lambda rows: _dequantise(rows, "Q8_0"),
    "dequantise_others": _others,
    "fused_32_ratio": lambda rows: _over(
        _product(rows, "dequantise + matmul", FEW), _product(rows, "fused", FEW)
    ),
    "fused_32_us": lambda rows: _product(rows, "fused", FEW),
    "dequantise_matmul_4128": lambda rows: _over(
        _product(rows, "dequantise + matmul", MANY), _product(rows, "resident", MANY)
    ),
    "fused_4128_tflops": lambda rows: _product(rows, "fused", MANY, "tflops"),
    "crossover": crossover,
    "block_diffusers": lambda rows: _compared(rows, "diffusers", "packed", what="block", format="Q4_K"),
    "block_resident": lambda rows: _compared(rows, "resident", "packed", what="block", format="Q4_K"),
    "step_linears": lambda rows: part(rows, "linears"),
    "step_attention_cudnn": lambda rows: part(rows, "attention, cudnn"),
    "step_attention_flash": lambda rows: part(rows, "attention, flash"),
    "step_dequantise": lambda rows: part(rows, "dequantise"),
    "step_elementwise": lambda rows: part(rows, "element-wise"),
    "step_gaps": gaps,
    "step_replayed": _step(MANY),
    "step_eager": _eager(MANY),
    "step_512_replayed": _step(LITTLE),
    "step_512_eager": _eager(LITTLE),
    "int8_4128_tops": lambda rows: _product(rows, "int8", MANY, "tflops"),
    "int8_step": _step(MANY, "int8"),
    "int8_step_kept": _step(MANY, "int8 kept"),
    **{f"elementwise_{name}": _elementwise(name) for name in cases.STREAMS},
    "attention": _attention("nn.attention"),
    "attention_int8": _attention("int8"),
}
"""Value of each figure from the rows of one run, None where they do not hold it."""


def load() -> list[dict[str, Any]]:
    """The figures as `standing.json` has them."""
    found: list[dict[str, Any]] = json.loads(DATA.read_text("utf-8"))
    return found


def save(figures: Sequence[Mapping[str, Any]], data: Path = DATA) -> None:
    """One figure a line, in one step."""
    lines = ",\n".join(f" {json.dumps(figure, ensure_ascii=False)}" for figure in figures)
    write_atomically(data, f"[\n{lines}\n]\n".encode(), overwrite=True)


def evaluate(rows: Rows) -> dict[str, float]:
    """Every figure that the rows hold."""
    values = {name: figure(rows) for name, figure in FIGURES.items()}
    return {name: float(f"{value:.4g}") for name, value in values.items() if value is not None}


def updated(
    figures: Sequence[Mapping[str, Any]], values: Mapping[str, float], gpu: str, date: str
) -> list[dict[str, Any]]:
    """The figures with new values in place of the old."""
    return [
        {**figure, "measured": {"value": values[figure["id"]], "gpu": gpu, "date": date}}
        if figure["id"] in values
        else dict(figure)
        for figure in figures
    ]


def from_files(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], str, str]:
    """(rows, GPU, date) of result files of one GPU.

    Raises:
        SystemExit: A file is not of a GPU, or they are of two, or its results were not checked.
    """
    rows, gpus, dates = [], set(), set()
    for path in sorted(paths):
        head = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if not head.get("arguments", {}).get("check", True):
            raise SystemExit(f"{path.name} was made with --no-check: its kernels may have computed anything")
        about = head["machine"]
        gpus.add(about["gpu"])
        dates.add(about["date"])
        rows += read(path)
    if len(gpus) != 1 or None in gpus:
        raise SystemExit(f"standing figures come from result files of one GPU, these are of {gpus or 'none'}")
    return rows, gpus.pop(), max(dates)


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    rows = ([f["text"], aim(f), predicted(f), measured(f)] for f in figures)
    return markdown("figure | aim | predicted | last measured", rows)


def predicted(figure: Mapping[str, Any]) -> str:
    """The model's range, for the GPU of the measurement where the model knows it."""
    found = figure["measured"]
    return predictions.shown(figure["id"], found["gpu"] if found else "")


def aim(figure: Mapping[str, Any]) -> str:
    """`at least 85 %`, or `none`."""
    for word in ("least", "most"):
        if word in figure:
            return f"at {word} {figure[word]:g} {figure['unit']}"
    return f"none ({figure['unit']})"


def measured(figure: Mapping[str, Any]) -> str:
    """Value, GPU and date, whether the aim is missed, and how the prediction fared."""
    found = figure["measured"]
    if found is None:
        return "not yet measured"
    value = found["value"]
    met = value >= figure.get("least", -math.inf) and value <= figure.get("most", math.inf)
    said = ["" if met else "missed", predictions.meets(figure["id"], found["gpu"], value)]
    about = ", ".join(filter(None, said))
    return f"{value:g} {figure['unit']} ({found['gpu']}, {found['date']})" + (f": {about}" if about else "")


def update(rows: Rows, gpu: str, date: str) -> None:
    """Write the figures that the rows hold into standing.json and benchmarks/README.md."""
    figures = updated(load(), evaluate(rows), gpu, date)
    save(figures)
    fill_tables(README, {"standing": table(figures)})
