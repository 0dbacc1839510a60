"""Rows of figures as CSV, and the environment they were taken in as JSON beside them."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, features, machine
from zimage_core.files.atomic import write_atomically

COLUMNS = (
    "what", "case", "format", "n", "k", "m", "dtype", "contestant", "how", "median_us", "p20_us", "p80_us",
    "gbps", "tflops", "of_ceiling", "error", "ratio", "baseline", "count", "note",
)  # fmt: skip
"""`of_ceiling`: the time that the slower of the two measured ceilings allows, over the median. `error`:
relative, in the 2-norm. `ratio`: to the baseline of the same case and run, below 1 is faster. `count`:
times a step. A row without times says in `note` why."""
PACKAGES = ("numpy", "triton", "pytorch-triton-rocm", "diffusers", "gguf", "gemlite")
ROOT = Path(__file__).parents[1]


def slug(device: torch.device) -> str:
    """Name of a device as a piece of a file name."""
    if device.type != "cuda":
        return "_".join(["cpu", *features(), f"threads_{torch.get_num_threads()}"])
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, GPU, driver, versions, commit."""
    found: dict[str, Any] = machine() | {"gpu": None, "commit": commit(), "packages": versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "arch": getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "runtime": torch.version.hip or torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "state": _state(),
        }
    return found


def versions() -> dict[str, str]:
    """Installed packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Hash of the checkout, with a mark when files differ from it; None outside a checkout."""
    try:
        head = _output("git", "rev-parse", "HEAD")
        return head + ("+changes" if _output("git", "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _state() -> dict[str, str]:
    """Driver, clocks and power as the vendor's tool tells them; empty where there is none."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    try:
        line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (part.strip() for part in line.splitlines()[0].split(",")), strict=False))


def _output(*command: str) -> str:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return run.stdout.strip()


class Results:
    """Rows of one run, on the disk after every case.

    Args:
        what: First part of the file name.
        device: Its name is the second part, the date the third.
        folder: Where; None writes nothing.
        about: What else the JSON should say: arguments, ceilings.
    """

    def __init__(
        self, what: str, device: torch.device, folder: Path | None, about: Mapping[str, Any]
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._head = {"machine": environment(device), **about}
        date = self._head["machine"]["date"]
        self.path = None if folder is None else folder / f"{what}_{slug(device)}_{date}.csv"

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
    """CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _shown(row[name]) for name in COLUMNS} for row in rows)
    return out.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV; numbers as numbers, and what is empty as the empty string."""
    with path.open(newline="") as lines:
        return [{name: _parsed(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def line(row: Mapping[str, Any]) -> str:
    """A row as one line for people."""
    shape = " x ".join(str(row[k]) for k in ("n", "k") if row[k] != "")
    place = " ".join(str(p) for p in (row["case"], row["format"], shape, row["m"] and f"M={row['m']}") if p)
    if row["median_us"] == "":
        return f"{place:44} {row['contestant']:24} {row['note']}"
    rate = f"{row['gbps']:8.0f} GB/s" if row["gbps"] else 13 * " "
    rate += f"{row['tflops']:8.2f} TFLOP/s" if row["tflops"] else 16 * " "
    of = f"{row['of_ceiling']:6.1%}" if row["of_ceiling"] else 6 * " "
    ratio = f"  {row['ratio']:.3f} of {row['baseline']}" if row["ratio"] else ""
    error = f"  error {row['error']:.1e}" if row["error"] != "" else ""
    times = f"{row['median_us']:11.1f} us ({row['p20_us']:.1f} {row['p80_us']:.1f})"
    note = f"  {row['note']}" if row["note"] else ""
    return f"{place:44} {row['contestant']:24} {times:34}{rate} {of} {row['how']}{ratio}{error}{note}"


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _parsed(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


__all__ = ["COLUMNS", "RESULTS", "Results", "environment", "read", "slug", "text"]
