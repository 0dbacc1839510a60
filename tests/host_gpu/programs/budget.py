"""Is a memory budget kept? Planned, allocated, reserved and given by the driver, phase by phase.

    budget.py [--vram 6GiB] [--spare BYTES] [--files FOLDER] [--pixels 1024] [--compute int8] [--controlnet F]
              [--lora F] [--references N]

The card has the budget's memory and that of the driver's context, and nothing more; with --spare that much
more. Copies move nothing, so that device memory needs none of the host's.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import fake_cuda

fake_cuda.settings(FAKE_NO_COPY=1, FAKE_CONTEXT_MB=600, FAKE_ARCH=86)

import os

import project
import torch
from PIL import Image

from zimage_core.errors import ZImageError
from zimage_core.files.units import parse_bytes
from zimage_core.run.placement import Placement
from zimage_core.text.prompt import prompt_ids

MIB = project.MIB
STEPS = 2


def record_phases():
    """A list that every phase of a run adds to: its name and its peaks in bytes."""
    rows = []
    original = Placement.phase

    @contextmanager
    def phase(self, name, *rest):
        torch.cuda.reset_peak_memory_stats()
        fake_cuda.most(reset=True)
        try:
            with original(self, name, *rest):
                yield
        finally:
            peaks = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "given": fake_cuda.most(),
            }
            rows.append({"phase": name, **peaks})

    Placement.phase = phase
    return rows


def budget_of(pipe, vram, pixels, references):
    """Bytes of a budget; of "least", what the plan says."""
    if vram != "least":
        return parse_bytes("vram", vram)
    tokens = len(prompt_ids(pipe.tokenizer, project.PROMPT))
    more = {"steps": STEPS, "references": references}
    return pipe.plan(pixels, pixels, 1, tokens, **more).floor


def run(pipe, pixels, rows, words, **more):
    """One run -> its phases with what was planned for them; an error in place of the plan."""
    rows.clear()
    found = {"error": None, "planned": None, "peak": None}
    try:
        prompt = " ".join(["red"] * words) or project.PROMPT
        plan = project.picture(
            pipe, pixels, STEPS, prompt=prompt, max_sequence_length=1504, **more
        ).memory.plan
    except (torch.OutOfMemoryError, ZImageError) as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    else:
        found["planned"] = plan.vram
        for row in rows:
            row["planned"] = plan.phase("decode" if row["phase"] == "image" else row["phase"]).peak
        found["peak"] = plan.peak
    return {**found, "phases": [dict(row) for row in rows]}


def show(number, found):
    print(f"run {number}, MiB   planned  allocated  reserved     given", file=sys.stderr)
    for row in found["phases"]:
        figures = (row.get(key, 0) / MIB for key in ("planned", "allocated", "reserved", "given"))
        print(f"  {row['phase']:9}" + "".join(f"{figure:10.1f}" for figure in figures), file=sys.stderr)
    if found["error"]:
        print(f"  {found['error']}", file=sys.stderr)


def main():
    parser = project.arguments(__doc__)
    parser.add_argument("--vram", default="least", help='as of the pipeline: "6GiB", "least"; default: least')
    parser.add_argument(
        "--spare", default="0", help="bytes that the card has beside budget and context: 1GiB"
    )
    parser.add_argument("--words", type=int, default=0, help="of another caption; default: a short one")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--compute", default="exact", help="in which numbers blocks multiply; default: exact")
    parser.add_argument("--controlnet", help="a ControlNet that follows an image, from which the run begins")
    parser.add_argument("--lora", help="a LoRA of the transformer")
    parser.add_argument(
        "--references", type=int, default=0, help="images of the same size that an Omni folder takes"
    )
    args = parser.parse_args()
    project.patch_out()
    rows = record_phases()
    tower = {"siglip": args.files / "siglip"} if args.references else {}
    pipe = project.open_pipeline(args.files, device="cpu", dtype="bfloat16", compute=args.compute, **tower)
    more = {}
    if args.references:
        size = (args.pixels or pipe.sample_size,) * 2
        more["reference_images"] = [Image.new("RGB", size, n) for n in range(args.references)]
    if args.lora:
        pipe.load_lora(args.lora)
    if args.controlnet:
        pipe.load_controlnet(args.controlnet)
        picture = Image.new("RGB", (64, 64))
        more |= {"control_image": picture, "image": picture}
    project.read_nothing()
    pixels = args.pixels or pipe.sample_size
    vram = budget_of(pipe, args.vram, pixels, args.references)
    spare = 0 if args.spare == "0" else parse_bytes("spare", args.spare)
    fake_cuda.set_memory(vram + (int(os.environ["FAKE_CONTEXT_MB"]) << 20) + spare)
    pipe.limit_memory(vram=args.vram, device="cuda")
    runs = []
    for number in range(1, args.runs + 1):
        runs.append(run(pipe, pixels, rows, args.words, **more))
        show(number, runs[-1])
        if runs[-1]["error"]:
            break
    stats = torch.cuda.memory_stats()
    project.answer(
        vram=vram, runs=runs, retries=stats.get("num_alloc_retries", 0), ooms=stats.get("num_ooms", 0)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
