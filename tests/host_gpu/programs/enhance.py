"""Does a language model keep a memory budget, and run on a device without one?

    enhance.py [--vram 4GiB] [--files FOLDER] [--new 24] [--runs 2]

Tokens are chosen here, since kernels compute nothing: the logits are read and the answer is always the same.
The prompt is so long that keys and values grow by a chunk while the model writes.
"""

from __future__ import annotations

import sys

import fake_cuda

fake_cuda.settings(FAKE_NO_COPY=1, FAKE_CONTEXT_MB=600, FAKE_ARCH=86)

import os
import warnings

import project
import torch

from zimage_core.errors import ZImageError
from zimage_core.files.units import parse_bytes
from zimage_core.language.enhance import Wish
from zimage_core.language.sampling import Chooser
from zimage_core.models.kv_cache import CHUNK

TOKEN = 1000
"""What the model writes, again and again."""


def choose(chooser, logits):
    logits.to("cpu", torch.float64)
    return TOKEN


def prompt_before_a_chunk(pipe, new):
    """A prompt that with its instructions ends a few tokens before a chunk of the cache is full."""
    for words in range(1, CHUNK + 1):
        prompt = " ".join(["red"] * words)
        if len(Wish.of(prompt).ids(pipe.tokenizer)) % CHUNK == CHUNK - new // 2:
            return prompt
    raise ValueError("no number of words gives such a prompt")


def write(pipe, prompt, new):
    """One text -> what went wrong, how many tokens there are, and the peaks in bytes."""
    torch.cuda.reset_peak_memory_stats()
    fake_cuda.most(reset=True)
    found = {"error": None, "tokens": 0, "planned": None}
    try:
        found["tokens"] = pipe.enhance_prompt(prompt, max_new_tokens=new, seed=1).tokens
    except (torch.OutOfMemoryError, ZImageError) as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if report := pipe._placement.report():
        found["planned"] = report.plan.phase("encode").peak
        found["streamed"] = report.plan.component("text_encoder").streamed
        found["moved"] = sum(each.bytes_moved for each in report.traffic.values())
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {**found, **peaks, "given": fake_cuda.most(), "left": torch.cuda.memory_allocated()}


def main():
    parser = project.arguments(__doc__)
    parser.add_argument("--vram", help="as of the pipeline; default: no budget")
    parser.add_argument("--new", type=int, default=24, help="tokens to write; default: 24")
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    project.patch_out()
    warnings.filterwarnings("ignore", ".*was cut after.*")
    Chooser.__call__ = choose
    pipe = project.open_pipeline(args.files, device="cpu", dtype="bfloat16")
    prompt = prompt_before_a_chunk(pipe, args.new)
    project.read_nothing()
    context, vram = int(os.environ["FAKE_CONTEXT_MB"]) << 20, None
    if args.vram:
        vram = None if args.vram == "least" else parse_bytes("vram", args.vram)
        if vram:
            fake_cuda.set_memory(vram + context)
        pipe.limit_memory(vram=args.vram, device="cuda")
    else:
        pipe.to("cuda")
    runs = []
    for _ in range(args.runs):
        runs.append(write(pipe, prompt, args.new))
        figures = {
            name: n if n is None else round(n / project.MIB)
            for name, n in runs[-1].items()
            if name not in ("error", "tokens")
        }
        print(runs[-1]["error"], runs[-1]["tokens"], figures, file=sys.stderr)
    stats = torch.cuda.memory_stats()
    project.answer(
        vram=vram, runs=runs, retries=stats.get("num_alloc_retries", 0), ooms=stats.get("num_ooms", 0)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
