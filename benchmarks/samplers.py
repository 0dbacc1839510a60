"""What samplers, schedules and variety do on the embedded model, in latents and in images.

    python -m benchmarks.samplers [--prompts 8 --exam 32] [--parts errors images variety]

errors: distance of the final latents from a solution by 200 Euler steps, for each sampler without noise and
each schedule. images: share of right images for all samplers. variety: distance between images of one prompt
and share of right images. Results go to benchmarks/results/samplers.json; a part that is there is not
measured again. At the end the tables in docs/guides/sampling.md are made from it, unless --out is another
file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.nano.check import SEED, exam, read, score
from benchmarks.report import RESULTS, ROOT, arguments, fill_tables, markdown, write
from zimage_core import ZImagePipeline
from zimage_core.sampling.samplers import SAMPLERS, SCHEDULES

STEPS = (4, 6, 8, 12)
LONG = 200
"""Euler steps of the solution that errors are counted from."""
MOST_CALLS = (2, 8)
AMOUNTS = (0.0, 0.1, 0.3, 1.0, 2.0)
SEEDS = 8
"""Images of each prompt whose distances are taken."""


def calls(sampler: str, steps: int) -> int:
    """Calls of the network for each image."""
    return 2 * steps - 1 if sampler == "heun" else steps


def errors(pipe: ZImagePipeline, prompts: list[str], _: int) -> dict[str, Any]:
    """Relative distance from the solution, root mean square over the prompts, for each combination."""
    squares: dict[tuple[str, str, int], list[float]] = {}
    check = []

    def latents(k: int, **call: Any) -> torch.Tensor:
        found = pipe(prompts[k], seed=SEED + k, output_type="latent", **call).images
        assert isinstance(found, torch.Tensor)
        return found

    for k in range(len(prompts)):
        true = latents(k, num_inference_steps=LONG)
        again = latents(k, num_inference_steps=LONG // 2, sampler="heun")
        check.append(float((again - true).norm() / true.norm()) ** 2)
        for sampler, place in SAMPLERS.items():
            for schedule in () if place.stochastic else SCHEDULES:
                for steps in STEPS:
                    got = latents(k, num_inference_steps=steps, sampler=sampler, schedule=schedule)
                    error = float((got - true).norm() / true.norm())
                    squares.setdefault((sampler, schedule, steps), []).append(error**2)
        print(f"errors: {k + 1} of {len(prompts)}", flush=True)
    rows = [
        {"sampler": sampler, "schedule": schedule, "steps": steps, "calls": calls(sampler, steps),
         "error": float(np.sqrt(np.mean(each)))}
        for (sampler, schedule, steps), each in squares.items()
    ]  # fmt: skip
    return {"prompts": len(prompts), "solution_check": float(np.sqrt(np.mean(check))), "rows": rows}


def right(pipe: ZImagePipeline, count: int, **call: Any) -> int:
    """How many held-out prompts are drawn right in every attribute."""
    scenes, prompts = exam(count)
    images = [np.asarray(pipe(p, seed=SEED + k, **call).images[0]) for k, p in enumerate(prompts)]
    return score(scenes, [read(image) for image in images])["everything"]["right"]


def images(pipe: ZImagePipeline, _: list[str], count: int) -> dict[str, Any]:
    """Right images of every sampler with few and with 8 calls, on the checkpoint's own schedule."""
    rows = []
    for sampler in SAMPLERS:
        for most in MOST_CALLS:
            steps = (most + 1) // 2 if sampler == "heun" else most
            found = right(pipe, count, sampler=sampler, num_inference_steps=steps)
            rows.append({"sampler": sampler, "steps": steps, "calls": calls(sampler, steps), "right": found})
            print(f"images: {rows[-1]} of {count}", flush=True)
    return {"of": count, "rows": rows}


def variety(pipe: ZImagePipeline, prompts: list[str], count: int) -> dict[str, Any]:
    """Mean distance between two images of one prompt in 8-bit units, and right images, for each amount."""
    rows = []
    for amount in AMOUNTS:
        distances = []
        for prompt in prompts:
            call = {"num_images_per_prompt": SEEDS, "variety": amount, "output_type": "np"}
            made = pipe(prompt, seed=SEED, **call).images
            distances += [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in combinations(made, 2)]
        found = right(pipe, count, variety=amount)
        rows.append({"variety": amount, "distance": 255 * float(np.mean(distances)), "right": found})
        print(f"variety: {rows[-1]} of {count}", flush=True)
    return {"prompts": len(prompts), "seeds": SEEDS, "of": count, "rows": rows}


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/guides/sampling.md."""
    found = {(r["sampler"], r["schedule"], r["steps"]): r["error"] for r in report["errors"]["rows"]}
    pairs = list(dict.fromkeys((sampler, schedule) for sampler, schedule, _ in found))
    percents = [[f"{100 * found[(*pair, steps)]:.1f} %" for steps in STEPS] for pair in pairs]
    head = "sampler | schedule | " + " | ".join(f"{steps} steps" for steps in STEPS)
    drawn, moved = report["images"], report["variety"]
    by_sampler: dict[str, list[str]] = {}
    for row in drawn["rows"]:
        by_sampler.setdefault(row["sampler"], []).append(f"{row['right']} ({row['calls']})")
    return {
        "errors": markdown(head, ([*pair, *each] for pair, each in zip(pairs, percents, strict=True))),
        "images": markdown(
            f"sampler | right of {drawn['of']} (calls), at most {MOST_CALLS[0]} | at most {MOST_CALLS[1]}",
            ([name, *cells] for name, cells in by_sampler.items()),
        ),
        "variety": markdown(
            f"variety | distance of two images | right of {moved['of']}",
            ([f"{r['variety']:g}", f"{r['distance']:.1f}", r["right"]] for r in moved["rows"]),
        ),
    }


PARTS: dict[str, Callable[[ZImagePipeline, list[str], int], dict[str, Any]]] = {
    "errors": errors,
    "images": images,
    "variety": variety,
}


def main() -> None:
    parser = arguments(__doc__, "samplers.json")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--exam", type=int, default=32)
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=tuple(PARTS))
    args = parser.parse_args()
    out: Path = args.out
    report = json.loads(out.read_text("utf-8")) if out.exists() else {}
    report.pop("machine", None)
    pipe = ZImagePipeline.from_default()
    prompts = exam(args.prompts)[1]
    for part in args.parts:
        if part not in report:
            report[part] = PARTS[part](pipe, prompts, args.exam)
            write(out, report)
    if out == RESULTS / "samplers.json":
        fill_tables(ROOT / "docs/guides/sampling.md", tables(report))


if __name__ == "__main__":
    main()
