"""Write the parity table of docs/explanation/numerics.md.

    python -m benchmarks.parity

Compares every network and the whole pipeline, on tiny random weights, with diffusers and transformers: in
float64 and in float32.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from benchmarks.report import RESULTS, ROOT, fill_tables, machine, markdown, write
from tests.helpers import editing_parity, omni_parity, omni_pipeline, parity, pipeline_parity, vision
from zimage_core.vision.processor import Processor


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
    for grid in vision.GRIDS:
        found += vision.vision_differences(grid)
    found += [vision.picture_difference(path) for path in vision.IMAGES]
    found += [*pipeline_parity.pipeline_differences(), *omni_pipeline.pipeline_differences()]
    return [*found, *editing_parity.editing_differences()]


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


def resizes() -> dict[str, dict[str, float]]:
    """How far torch's resize of bytes, which torchvision calls, is from Pillow's, on image files."""
    found = {}
    for path in vision.PICTURES:
        image = Image.open(path).convert("RGB")
        processor = Processor()
        height, width = (n * processor.patch_size for n in processor.grid(image.height, image.width))
        ours = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR))).int()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        other = interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        apart = (other.int() - ours).abs()
        found[path.name] = {"largest": int(apart.max()), "share": float((apart > 0).double().mean())}
    return found


def main() -> None:
    """Measure, then replace the tables and the raw data."""
    found, on, shares = measure(), machine(), resizes()
    write(RESULTS / "parity.json", {"differences": [asdict(d) for d in found], "resizes": shares})
    versions = {"torch": on["torch"]} | {p: on["packages"][p] for p in ("diffusers", "transformers")}
    against = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = f"Against {against}, on a CPU with {on['cpu']}, {on['threads']} thread(s)."
    rows = [[name, f"{each['largest']} of 255", f"{each['share']:.2%}"] for name, each in shares.items()]
    resized = markdown("image | largest difference of a byte | share of bytes that differ", rows)
    tables = {"parity": f"{where}\n\n{table(found)}", "resizes": resized}
    fill_tables(ROOT / "docs/explanation/numerics.md", tables)


if __name__ == "__main__":
    main()
