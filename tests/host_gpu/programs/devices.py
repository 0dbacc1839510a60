"""Is GPU 0 left alone by a pipeline on cuda:1?

    devices.py [--files FOLDER]

Resident, with capture and dense weights, and under budgets. Then launches of Triton take cuda:1 for the
current device, so that no guard is set: that must be seen, or this program is blind.
"""

from __future__ import annotations

import sys
from unittest import mock

import fake_cuda

fake_cuda.settings(FAKE_DEVICES=2, FAKE_CONTEXT_MB=300)

import project
import torch

from zimage_core.errors import ZImageError


def run(args, name, **options):
    """Pictures on cuda:1 -> what was done on each GPU."""
    before, here = fake_cuda.counts(), fake_cuda.used(0)
    pipe = project.open_pipeline(args.files, device="cuda:1", **options)
    if not options:
        pipe.capture()
    project.picture(pipe, args.pixels)
    if not options:
        pipe.dequantize_weights()
        pipe.enable_vae_tiling()
        project.picture(pipe, args.pixels)
    torch.cuda.synchronize(1)
    return {
        "name": name,
        "given": [fake_cuda.used(0) - here, fake_cuda.used(1)],
        "contexts": [fake_cuda.has_context(0), fake_cuda.has_context(1)],
        "wrong": (fake_cuda.counts() - before)["wrong_device"],
        "current": torch.cuda.current_device(),
    }


def main():
    args = project.arguments(__doc__).parse_args()
    project.patch_out()
    runs = [run(args, "resident"), run(args, "auto", vram="auto"), run(args, "least", vram="least")]
    # until something runs on GPU 0, torch leaves the current device at 1 behind its guards: none is missed
    kept = torch.zeros(1, device="cuda:0")
    runs.append(run(args, "something on GPU 0"))
    before, error = fake_cuda.counts(), ""
    with mock.patch.object(torch.cuda, "current_device", return_value=1):
        try:
            run(args, "without guards")
        except (RuntimeError, ZImageError) as found:
            error = str(found).splitlines()[0]
    del kept
    project.answer(runs=runs, mutated=(fake_cuda.counts() - before)["wrong_device"], error=error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
