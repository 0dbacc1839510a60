"""Write the parity table of docs/numerics.md.

    python -m benchmarks.parity

Compares every network and the whole pipeline, on tiny random weights, with diffusers and transformers: in
float64 and in float32.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from tests.helpers import parity, pipeline_parity

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- parity table: python -m benchmarks.parity -->", "<!-- end of parity table -->"


def measure() -> list[parity.Difference]:
    """All comparisons."""
    found = []
    for case, sides, captions in parity.transformer_cases():
        found += parity.transformer_differences(sides, captions, case)
    for arch in parity.ENCODERS:
        found += [parity.text_encoder_difference(arch, length) for length in (1, 8, 37, 130)]
    for height, width in ((64, 64), (64, 48), (8, 8)):
        found += parity.autoencoder_differences(height, width)
    return [*found, *pipeline_parity.pipeline_differences()]


def table(found: list[parity.Difference]) -> str:
    """One row a case: the worst of its places in each column."""
    rows = [
        "| component | case | places | float64 | float32 | what float32 moves theirs | largest ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple[str, str], list[parity.Difference]] = {}
    for d in found:
        cases.setdefault((d.component, d.case), []).append(d)
    for (component, case), places in cases.items():
        columns = [max(getattr(d, name) for d in places) for name in ("float64", "float32", "theirs")]
        ratio = max(d.float32 / d.theirs if d.theirs else 0.0 for d in places)
        errors = " | ".join(f"{value:.1e}" for value in columns)
        rows.append(f"| {component} | {case} | {len(places)} | {errors} | {ratio:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, then replace the table and the raw data."""
    found = measure()
    packages = {p: version(p) for p in ("torch", "diffusers", "transformers")}
    cpu = f"a CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    raw = {
        "python": platform.python_version(),
        "cpu": cpu,
        "packages": packages,
        "differences": [asdict(d) for d in found],
    }
    (ROOT / "benchmarks/results/parity.json").write_text(json.dumps(raw, indent=1) + "\n")
    page = ROOT / "docs/numerics.md"
    text = page.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    against = ", ".join(f"{k} {v}" for k, v in packages.items())
    page.write_text(f"{head}{BEGIN}\n\nAgainst {against}, on {cpu}.\n\n{table(found)}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
