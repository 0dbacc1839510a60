"""Writes what the driver gave under budgets to budgets.json, and prints the table of
docs/explanation/streaming.md.

python -m tests.host_gpu.budgets
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.host_gpu import driven
from tests.host_gpu.sparse_models import write_models

CASES = [
    ("Q3_K_S", "least"), ("Q3_K_S", "6GiB"), ("Q4_K_M", "least"), ("Q4_K_M", "4GiB"), ("Q4_K_M", "6GiB"),
    ("Q4_K_M", "12GiB"), ("Q4_K_M", "24GiB"), ("Q8_0", "least"), ("Q8_0", "6GiB"), ("Q8_0", "12GiB"),
    ("Q8_0", "24GiB"),
]  # fmt: skip
KEYS = ("allocated", "reserved", "given")
MIB = 1 << 20


def measure() -> list[dict]:
    """Each case on a card that has its budget and the driver's context, and nothing more; two runs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mix, vram in CASES:
            files = write_models(Path(folder), mix)
            found = driven.run("budget", "--files", files, "--vram", vram, "--pixels", 1024)
            phases = [phase for run in found["runs"] for phase in run["phases"]]
            rows.append(
                {
                    "mix": mix,
                    "vram": vram,
                    "budget": found["vram"],
                    "planned": max(run["peak"] or 0 for run in found["runs"]),
                    **{key: max(phase[key] for phase in phases) for key in KEYS},
                    "retries": found["retries"],
                }
            )
            print(table(rows[-1:])[-1], flush=True)
    return rows


def table(rows: list[dict]) -> list[str]:
    """Markdown in MiB."""
    lines = ["| files | `vram=` | budget | planned | allocated | reserved | given | retries |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        figures = " | ".join(f"{row[key] / MIB:.0f}" for key in ("budget", "planned", *KEYS))
        lines.append(f"| {row['mix']} | {row['vram']} | {figures} | {row['retries']} |")
    return lines


def main() -> None:
    rows = measure()
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
