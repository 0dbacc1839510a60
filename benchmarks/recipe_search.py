"""Types chosen by measured sensitivity against the standard mixes, at the sizes of the mixes.

    python -m benchmarks.recipe_search [--exam 60 --compared 16 --calibration 8]

On the embedded model, K types for both. Costs are measured on prompts of the training set, all is judged on
held-out prompts of the exam: velocity where the original was, PSNR and SSIM of the images, and the share of
prompts that the checker finds right in everything. Both sides use the same importance matrix. The table of
docs/guides/recipes.md is made from the results by `python -m benchmarks.tables`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import Judge, calibration
from benchmarks.report import arguments, machine
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.export.mixes import standard_mix
from zimage_core.export.quantizing import LAYOUTS, quantize_file
from zimage_core.export.sizing import recipe_for_size
from zimage_core.study.sensitivity import measure
from zimage_core.study.swap import encode_all, stored_as
from zimage_core.study.velocity import record, velocity_error

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Without Q8_0: the shipped weights are Q8_0, so that it would cost nothing, which no mix can answer."""
MIXES = ("Q3_K_M", "Q4_K_M", "Q5_K_M")
EVERY = 4
"""One call of so many is kept for measuring."""


def main() -> None:
    """Measure costs once, then judge a mix, a rule of thumb and two searches at each size."""
    parser = arguments(__doc__, "recipe_search.json")
    parser.add_argument("--exam", type=int, default=60)
    parser.add_argument("--compared", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judge = Judge(folder, args)
        references = judge.references()
        # other scenes than those of the importance matrix, which come first
        calls = record(judge.pipe, calibration(2 * args.calibration)[args.calibration :], seed=1, every=EVERY)
        costs = {
            kind: measure(
                judge.pipe, calls, TYPES, imatrix=judge.imatrix, every_tensor=kind == "every tensor"
            )
            for kind in ("tensors of the mixes", "every tensor")
        }
        report: dict[str, Any] = {
            "machine": machine(),
            "settings": {
                **{k: getattr(args, k) for k in ("exam", "compared", "calibration")},
                "calls": len(calls),
            },
            "costs": {kind: each.costs for kind, each in costs.items()},
            "sizes": {},
        }
        with Checkpoint(judge.source, "transformer") as source:
            targets = source.targets(LAYOUTS["transformer"])
            for mix in MIXES:
                chosen = {"mix": standard_mix(mix, "transformer", {t.name: t for t in targets})}
                draft = folder / "draft.gguf"
                size = quantize_file(
                    judge.source, draft, recipe=chosen["mix"], imatrix=judge.imatrix, overwrite=True
                ).nbytes
                chosen["rule of thumb"] = recipe_for_size(source, targets, size)
                for kind, each in costs.items():
                    chosen[kind] = recipe_for_size(source, targets, size, each)
                rows = {}
                for how, recipe in chosen.items():
                    row, _ = judge.judge(recipe, judge.imatrix, references)
                    names = costs["every tensor"].costs
                    types = {tensor: recipe.type_of(tensor, 4) for tensor in names}
                    with stored_as(encode_all(judge.pipe.transformer, types, judge.imatrix)):
                        row["cost"] = velocity_error(judge.pipe.transformer, calls)
                    known = {t: f for t, f in types.items() if f in names[t]}
                    row["sum of costs"] = costs["every tensor"].total(known)
                    row["recipe"] = recipe.text().splitlines()
                    rows[how] = row
                    print(mix, how, {k: v for k, v in row.items() if k != "recipe"}, flush=True)
                report["sizes"][mix] = {"bytes": size, "choices": rows}
                args.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
