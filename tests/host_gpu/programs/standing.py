"""Does the standing list of GPU figures run from end to end? Its rehearsal, on tiny shapes.

    standing.py [ARGUMENTS OF benchmarks.gpu]

Nothing is checked, since kernels compute nothing. cuDNN is left out (`project`), so the rows of its attention
are refused; any other row has to be timed. The answer has the rows that were not. It also has the launches of
a step, counted and by the model.
"""

from __future__ import annotations

import sys

import fake_cuda

fake_cuda.settings(FAKE_ARCH=90)

import project
import torch

from benchmarks import gpu, step_model
from benchmarks.model_cases import stepper
from benchmarks.weights import blank, fill_packed
from zimage_core.formats import FORMATS
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.quant import dispatch


def launches(name="Q4_K", pixels=64, caption=32):
    """(launches of a step that dequantises its weights, those of the model of a step)."""
    dispatch.MODE = "dequantise"
    config, device, dtype = gpu.TINY_CONFIG, torch.device("cuda", 0), torch.bfloat16
    model = blank(lambda: ZImageTransformer(config), dtype, device)
    fill_packed(model, FORMATS[name], dtype, device)
    latent = torch.zeros(config.in_channels, 1, pixels // 8, pixels // 8, device=device)
    words = torch.zeros(caption, config.cap_feat_dim, device=device, dtype=dtype)
    step = stepper(model, latent, torch.zeros(1), words)
    step(0)
    before = fake_cuda.counts()
    step(0)
    calls = fake_cuda.counts() - before
    wanted = step_model.step(name=name, pixels=pixels, caption=caption, config=config).launches
    return calls["launch"] + calls["blas"], wanted


def main():
    project.patch_out()
    rows = gpu.main(["--rehearse", "--no-check", *sys.argv[1:]])
    timed = [row for row in rows if row["median_us"] != ""]
    left = [row for row in rows if row["median_us"] == "" and row["what"] != "ceiling"]
    columns = ("what", "case", "format", "variant", "note")
    project.answer(
        launches=launches(),
        timed=len(timed),
        kinds=sorted({row["what"] for row in timed}),
        graphs=sorted(
            row["variant"]
            for row in timed
            if row["what"] == "parts" and row["how"] == "graph" and "efficient" not in row["variant"]
        ),
        unchecked=all(row["note"].startswith("not checked") for row in timed),
        left=[{name: row[name] for name in columns} for row in left],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
