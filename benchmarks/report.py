"""What every benchmark writes beside its figures: the machine, and the spread of repeats."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def features() -> list[str]:
    """Which of the instruction sets that matter for matrix products this processor has."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in flags]


def machine() -> dict[str, Any]:
    """Processor, threads, versions and date."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "features": features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    low, mid, high = np.quantile(values, (0.2, 0.5, 0.8))
    return {"median": round(float(mid), 4), "p20": round(float(low), 4), "p80": round(float(high), 4)}


def write(path: Path, figures: dict[str, Any]) -> None:
    """JSON with the machine on top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=1, ensure_ascii=False) + "\n")


def fill_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page."""
    text = page.read_text("utf-8")
    for name, table in tables.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{page}: no place for the table {name}")
    page.write_text(text, "utf-8")
