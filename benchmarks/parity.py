"""Write the parity table of docs/numerics.md.

    python -m benchmarks.parity

Compares every network and the whole pipeline, in float32 on tiny random weights, with diffusers and
transformers.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

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
    """One row a case: the worst place inside it, and the output."""
    rows = ["| component | case | places compared | worst place | max abs error |", "|---|---|---|---|---|"]
    cases: dict[tuple[str, str], list[parity.Difference]] = {}
    for d in found:
        cases.setdefault((d.component, d.case), []).append(d)
    for (component, case), places in cases.items():
        worst = max(places, key=lambda d: d.error)
        rows.append(f"| {component} | {case} | {len(places)} | {worst.place} | {worst.error:.1e} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, then replace the table and the raw data."""
    found = measure()
    packages = {p: version(p) for p in ("torch", "diffusers", "transformers")}
    raw = {
        "python": platform.python_version(),
        "packages": packages,
        "differences": [asdict(d) for d in found],
    }
    (ROOT / "benchmarks/results/parity.json").write_text(json.dumps(raw, indent=1) + "\n")
    page = ROOT / "docs/numerics.md"
    text = page.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    against = ", ".join(f"{k} {v}" for k, v in packages.items())
    page.write_text(f"{head}{BEGIN}\n\nAgainst {against}, float32, CPU.\n\n{table(found)}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
