"""Write the parity table of docs/numerics.md.

    python -m benchmarks.parity

Compares every network and the whole pipeline, on tiny random weights, with diffusers and transformers: in
float64 and in float32.
"""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.report import RESULTS, ROOT, fill_tables, machine, markdown, write
from tests.helpers import editing_parity, omni_parity, parity, pipeline_parity


def measure() -> list[parity.Difference]:
    """All comparisons."""
    found = []
    for case, sides, captions in parity.transformer_cases():
        found += parity.transformer_differences(sides, captions, case)
    found += omni_parity.all_differences()
    for arch in parity.ENCODERS:
        found += [parity.text_encoder_difference(arch, length) for length in (1, 8, 37, 130)]
    for height, width in ((64, 64), (64, 48), (8, 8)):
        found += parity.autoencoder_differences(height, width)
    return [*found, *pipeline_parity.pipeline_differences(), *editing_parity.editing_differences()]


def table(found: list[parity.Difference]) -> str:
    """One row a case: the worst of its places in each column."""
    rows = []
    cases: dict[tuple[str, str], list[parity.Difference]] = {}
    for d in found:
        cases.setdefault((d.component, d.case), []).append(d)
    for (component, case), places in cases.items():
        columns = [max(getattr(d, name) for d in places) for name in ("float64", "float32", "theirs")]
        ratio = max(d.float32 / d.theirs if d.theirs else 0.0 for d in places)
        errors = [f"{value:.1e}" for value in columns]
        rows.append([component, case, len(places), *errors, f"{ratio:.2f}"])
    return markdown(
        "component | case | places | float64 | float32 | what float32 moves theirs | largest ratio", rows
    )


def main() -> None:
    """Measure, then replace the table and the raw data."""
    found, on = measure(), machine()
    write(RESULTS / "parity.json", {"differences": [asdict(d) for d in found]})
    versions = {"torch": on["torch"]} | {p: on["packages"][p] for p in ("diffusers", "transformers")}
    against = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = f"Against {against}, on a CPU with {on['cpu']}, {on['threads']} thread(s)."
    fill_tables(ROOT / "docs/numerics.md", {"parity": f"{where}\n\n{table(found)}"})


if __name__ == "__main__":
    main()
