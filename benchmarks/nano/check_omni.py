"""Measure what the Omni sibling takes from a reference, and what of text to image it still draws.

    python -m benchmarks.nano.check_omni [--count 200] [--to benchmarks/results/nano_omni] [--sheet FILE]

Every task has a scene and a reference that were held out of all training; seeds are fixed. The prompt
leaves out the colour or the background of its scene, which the reference has; in all else the reference is
another scene. "nothing open" names both colours, and the reference has neither. `check.read` reads the
images without a hint.

Rows: "whole" is the call as it is. Without a path, its share of the reference is replaced by zeros, the
features of the vision tower or the latents of the VAE; then the other path alone says what is open.
"neither" has zeros for both, and measures what can be guessed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.nano.check import ATTRIBUTES, SEED, exam, moot, read, score
from benchmarks.nano.draw import COLOURS, Scene, draw, random_scene, sheet
from benchmarks.nano.train_omni import Task
from zimage_core import ZImageOmniPipeline

Row = dict[str, Any]
KINDS = ("colour open", "background open", "nothing open")
ABLATIONS = ("whole", "no features", "no latents", "neither")


def tasks(kind: str, count: int) -> list[Task]:
    """Held-out tasks of a kind, always the same."""
    rng, found = np.random.default_rng((2030, KINDS.index(kind))), []
    colour, background = kind == "colour open", kind == "background open"
    while len(found) < count:
        scene, other = (random_scene(rng, held_out=True) for _ in range(2))
        taken = {"colour": scene.colour} if colour else {"background": scene.background} if background else {}
        reference = replace(other, **taken)
        # what is not open differs, so that it shows which of prompt and reference was followed
        same = [
            k
            for k in ("colour", "background")
            if k not in taken and getattr(scene, k) == getattr(reference, k)
        ]
        if reference.colour != reference.background and reference.held_out and not same:
            found.append(Task(scene, colour, background, reference))
    return found


@contextmanager
def zeros(module: Any, name: str) -> Iterator[None]:
    """A method of a component that gives zeros in place of its tensors."""
    method: Callable[..., Any] = getattr(module, name)

    def nothing(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs)
        return torch.zeros_like(out) if isinstance(out, Tensor) else tuple(map(torch.zeros_like, out))

    setattr(module, name, nothing)
    try:
        yield
    finally:
        delattr(module, name)


def right(task: Task, got: Scene) -> Row:
    """What an image has as the task wants it."""
    want = task.scene
    row: Row = {a: getattr(want, a) == getattr(got, a) for a in ATTRIBUTES if not moot(want, a)}
    row["everything"] = all(row.values())
    opened = [a for a, is_open in (("colour", task.colour), ("background", task.background)) if is_open]
    row["open"] = all(row[a] for a in opened) if opened else None
    row["all else"] = all(hit for a, hit in row.items() if a in ATTRIBUTES and a not in opened)
    return row


def references_exam(pipe: ZImageOmniPipeline, count: int) -> tuple[dict[str, list[Row]], list[np.ndarray]]:
    """All kinds of tasks with all ablations."""
    rows: dict[str, list[Row]] = {}
    shown: list[np.ndarray] = []
    for kind in KINDS:
        asked, rng = tasks(kind, count), np.random.default_rng((2031, KINDS.index(kind)))
        drawn = [draw(t.reference, rng) for t in asked]
        prompts = [t.prompt(rng, chinese=bool(k % 2)) for k, t in enumerate(asked)]
        for ablation in ABLATIONS if kind != "nothing open" else ABLATIONS[:1]:
            with ExitStack() as stack:
                if ablation in ("no features", "neither"):
                    stack.enter_context(zeros(pipe.siglip, "forward"))
                if ablation in ("no latents", "neither"):
                    stack.enter_context(zeros(pipe.vae, "moments"))
                made = [
                    np.asarray(pipe(Image.fromarray(d), p, seed=SEED + k).images[0])
                    for k, (d, p) in enumerate(zip(drawn, prompts, strict=True))
                ]
            rows[f"{kind}, {ablation}"] = [right(t, read(m)) for t, m in zip(asked, made, strict=True)]
            if ablation == "whole":
                shown += [*drawn[:12], *made[:12]]
                print(f"{kind}:", *prompts[:12], sep="\n  ")
    return rows, shown


def text_exam(count: int) -> dict[str, Any]:
    """The prompts of the accuracy table, without a reference, by the sibling."""
    from zimage_core import ZImagePipeline

    pipe = ZImagePipeline(**ZImageOmniPipeline.from_default().components)
    scenes, prompts = exam(count)
    seen = [read(np.asarray(pipe(p, seed=SEED + k).images[0])) for k, p in enumerate(prompts)]
    return score(scenes, seen)


def share(rows: list[Row], key: str) -> str:
    """How many rows that have the key are true in it."""
    found = [bool(row[key]) for row in rows if row.get(key) is not None]
    return f"{100 * np.mean(found):.1f} %" if found else "-"


COLUMNS = ("open", "all else", *ATTRIBUTES, "everything")


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report."""
    lines = [
        "# What the Omni sibling of the embedded model takes from a reference",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].splitlines(),
        "",
        f"{report['count']} tasks of each kind. There are {len(COLOURS)} colours, of which the other one of",
        "a scene is excluded: a guess is right once in seven times.",
        "",
        "| " + " | ".join(("case", *COLUMNS)) + " |",
        "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    for case, rows in report["references"].items():
        lines.append("| " + " | ".join((case, *(share(rows, key) for key in COLUMNS))) + " |")
    lines += [
        "",
        f"Text to image by the sibling, the first {report['prompts']} prompts of the accuracy table:",
        "",
    ]
    lines += ["| attribute | asked | right |", "| --- | --- | --- |"]
    for name, cell in report["text to image"].items():
        if cell["of"]:
            lines.append(f"| {name} | {cell['of']} | {100 * cell['right'] / cell['of']:.1f} % |")
    return "\n".join(lines) + "\n"


def columns(rows: list[Row]) -> dict[str, list[Any]]:
    """Rows as lists by key: truth values as 0 and 1, null where a row lacks the key."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [None if row.get(key) is None else int(row[key]) for row in rows] for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--to", type=Path, help="stem of the .json and .md files to write")
    parser.add_argument("--sheet", type=Path, help="write the first references and images of each kind here")
    args = parser.parse_args()
    rows, shown = references_exam(ZImageOmniPipeline.from_default(), args.count)
    report: dict[str, Any] = {"count": args.count, "references": rows, "prompts": 500}
    report["text to image"] = text_exam(report["prompts"])
    print(markdown(report))
    if args.sheet:
        sheet(shown, columns=12).save(args.sheet)
    if args.to:
        args.to.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        raw = {**report, "references": {case: columns(found) for case, found in rows.items()}}
        args.to.with_suffix(".json").write_text(json.dumps(raw) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
