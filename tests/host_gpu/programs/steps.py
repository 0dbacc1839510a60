"""What a step asks of the driver and of the allocator, and how many kernels are compiled.

    steps.py [--files FOLDER] [--pixels 1024] [--vram 6GiB]

Counted in a picture's loop, from the end of its third step to that of its fourth: launches by kind, what
the host waits for, copies, events, allocations. Kernels are counted as they are loaded, for a first picture
and for a second one whose caption has another length.
"""

from __future__ import annotations

import sys
import time

import fake_cuda

fake_cuda.settings(FAKE_NO_COPY=1)

import project
import torch

KINDS = {
    "product": ("cublas", "gemm", "gemv"),
    "fused product": ("matmul",),
    "dequantise": ("dequantize",),
    "attention": ("flash", "attention", "fmha"),
    "element-wise, Triton": ("triton:",),
    "element-wise, torch": ("",),
}
"""Kind of launch -> parts of kernels' names; the first that fits."""
CALLS = ("copy", "record", "stream_wait", "malloc", "host_alloc", *fake_cuda.WAITS)
CAPTIONS = (
    "a red circle",
    "a small red circle on the left of a blue background, and a yellow star beside it",
)
STEPS = 4


def kind_of(kernel):
    return next(kind for kind, parts in KINDS.items() if any(part in kernel.lower() for part in parts))


def allocations():
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def settled():
    """Counters when the thread that reads ahead has read what it can."""
    found = fake_cuda.counts()
    while True:
        time.sleep(0.1)
        before, found = found, fake_cuda.counts()
        if found == before:
            return found


def picture(pipe, pixels, caption):
    """One picture -> what its last step did."""
    marks = []

    def mark(pipe, step, timestep, tensors):
        marks.append((settled(), allocations(), fake_cuda.launched(reset=True)))

    project.picture(pipe, pixels, STEPS, "latent", prompt=caption, callback_on_step_end=mark)
    (before, taken, _), (after, given, kernels) = marks[-2:]
    calls = after - before
    kinds = dict.fromkeys(KINDS, 0)
    for kernel, count in kernels.items():
        kinds[kind_of(kernel)] += count
    launches = calls["launch"] + calls["blas"]
    return {
        "launches": {"all": launches, **{kind: count for kind, count in kinds.items() if count}},
        "allocations": given - taken,
        **{call: calls[call] for call in CALLS},
    }


def main():
    parser = project.arguments(__doc__)
    parser.add_argument("--vram", help="a budget, under which blocks are streamed; default: none")
    args = parser.parse_args()
    project.patch_out()
    options = {"device": "cuda"} if args.vram is None else {"device": "cuda", "vram": args.vram}
    pipe = project.open_pipeline(args.files, dtype="bfloat16", **options)
    if args.files:
        project.read_nothing()
    kernels, step = [], {}
    for caption in CAPTIONS:
        before = fake_cuda.counts()
        step = picture(pipe, args.pixels, caption)
        kernels.append((fake_cuda.counts() - before)["module"])
    project.answer(kernels={"first picture": kernels[0], "another caption": kernels[1]}, step=step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
