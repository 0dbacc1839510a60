"""Facts about the machine, JSON with them on top, and tables put into pages between their markers."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
NANO = ROOT / "zimage_core/assets/nano"
"""The folder of the embedded model."""
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
"""Instruction sets that matter for matrix products, as /proc/cpuinfo names them."""
PACKAGES = ("numpy", "triton", "pytorch-triton-rocm", "diffusers", "transformers", "gguf", "gemlite")
GPU_STATE = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def features() -> list[str]:
    """Those of FEATURES that this processor has."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    return [name for name in FEATURES if name in flags]


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, threads, versions, commit and date; with a CUDA or HIP device, that device too."""
    found: dict[str, Any] = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "features": features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "packages": _versions(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "arch": getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "runtime": torch.version.hip or torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "state": _gpu_state(),
        }
    return found


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


def _commit() -> str | None:
    """Hash of the checkout, with a mark when files differ from it; None outside a checkout."""
    head = _output("git", "rev-parse", "HEAD")
    return head + ("+changes" if _output("git", "status", "--porcelain") else "") if head else None


def _gpu_state() -> dict[str, str]:
    """Driver, clocks and power as the vendor's tool tells them; empty where there is none."""
    line = _output("nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader")
    parts = (part.strip() for part in line.partition("\n")[0].split(","))
    return dict(zip(GPU_STATE, parts, strict=False)) if line else {}


def _output(*command: str) -> str:
    """What a command prints, empty where it fails or is not installed."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its description and `--out`, by default `results/OUT`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """JSON with the machine on top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **figures}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def read(name: str) -> Any:
    """The committed figures `results/NAME`."""
    return json.loads((RESULTS / name).read_text("utf-8"))


def compiled_rows() -> list[dict[str, str]]:
    """The committed matrix of compiled kernels."""
    with (RESULTS / "compile_matrix.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(columns: str, rows: Iterable[Iterable[Any]]) -> str:
    """A table; `columns` is its head, the names between bars."""
    names = columns.split(" | ")
    lines = [f"| {columns} |", f"|{' --- |' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with each table between `<!-- begin NAME: COMMAND -->` and `<!-- end NAME -->` made anew.

    Raises:
        SystemExit: The page does not have exactly one such place for a table.
    """
    for name, table in tables.items():
        pattern = rf"(<!-- begin {re.escape(name)}(?:: [^\n]*)? -->\n).*?(<!-- end {re.escape(name)} -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"found {count} places for the table {name} where the page should have one")
    return text


def fill_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page, see `with_tables`."""
    page.write_text(with_tables(page.read_text("utf-8"), tables), "utf-8")
