"""Rows of figures as CSV, with a JSON beside them about the machine and the run."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import features, machine
from zimage_core.files.atomic import write_atomically

COLUMNS = (
    "what", "case", "format", "n", "k", "m", "dtype", "variant", "how", "median_us", "p20_us", "p80_us",
    "gbps", "tflops", "of_ceiling", "error", "ratio", "baseline", "count", "note",
)  # fmt: skip
"""`of_ceiling`: the time that the slower of the two measured ceilings allows, over the median. `error`:
relative, in the 2-norm. `ratio`: to the baseline of the same case and run, below 1 is faster. `count`:
times a step. A row without times says in `note` why."""


def slug(device: torch.device) -> str:
    """Name of a device as a piece of a file name."""
    if device.type != "cuda":
        return "_".join(["cpu", *features(), f"threads_{torch.get_num_threads()}"])
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


class Results:
    """Rows of one run, on the disk after every case.

    Args:
        what: First part of the file name.
        device: Its name is the second part, the date the third.
        out: A folder, or the CSV file itself; None writes nothing.
        about: What else the JSON should say: arguments, ceilings.
    """

    def __init__(self, what: str, device: torch.device, out: Path | None, about: Mapping[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._head = {"machine": machine(device), **about}
        name = f"{what}_{slug(device)}_{self._head['machine']['date']}.csv"
        self.path = out if out is None or out.suffix == ".csv" else out / name

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over rows, print and write them."""
        for row in rows:
            self.rows.append({name: row.get(name, "") for name in COLUMNS})
            print(line(self.rows[-1]), flush=True)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text(self.rows).encode(), overwrite=True)
        head = json.dumps(self._head, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path.with_suffix(".json"), head.encode(), overwrite=True)


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a header; floats with six digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({n: f"{row[n]:.6g}" if isinstance(row[n], float) else row[n] for n in COLUMNS})
    return out.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV; numbers as numbers, and what is empty as the empty string."""
    with path.open(newline="") as lines:
        return [{name: _parsed(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def _parsed(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def line(row: Mapping[str, Any]) -> str:
    """A row as one line for people."""
    shape = " x ".join(str(row[k]) for k in ("n", "k") if row[k] != "")
    place = " ".join(str(p) for p in (row["case"], row["format"], shape, row["m"] and f"M={row['m']}") if p)
    if row["median_us"] == "":
        return f"{place:44} {row['variant']:24} {row['note']}"
    rate = f"{row['gbps']:8.0f} GB/s" if row["gbps"] else 13 * " "
    rate += f"{row['tflops']:8.2f} TFLOP/s" if row["tflops"] else 16 * " "
    of = f"{row['of_ceiling']:6.1%}" if row["of_ceiling"] else 6 * " "
    ratio = f"  {row['ratio']:.3f} of {row['baseline']}" if row["ratio"] else ""
    error = f"  error {row['error']:.1e}" if row["error"] != "" else ""
    times = f"{row['median_us']:11.1f} us ({row['p20_us']:.1f} {row['p80_us']:.1f})"
    note = f"  {row['note']}" if row["note"] else ""
    return f"{place:44} {row['variant']:24} {times:34}{rate} {of} {row['how']}{ratio}{error}{note}"
