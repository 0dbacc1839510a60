"""Measure what the Omni sibling takes from a reference, and what of text to image it still draws.

    python -m benchmarks.nano.check_omni [--count 200] [--to benchmarks/results/nano_omni] [--sheet FILE]

Every task has a scene and a reference that were held out of all training; seeds are fixed. The prompt
leaves out the colour or the background of its scene, which the reference has; in all else the reference is
another scene. "nothing open" names both colours, and the reference has neither. `check.read` reads the
images without a hint. The files are dequantised, and the images are made in batches by the pass of the
training, in eight steps without guidance; `tests/nano/test_omni_forward.py` compares it with the library's.

Rows: "whole" is the call as it is. "no features" is a reference without those of the vision tower, "no
latents" one without the VAE's; the other path alone then says what is open. "neither" has none of both, and
shows what can be guessed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.nano.check import ATTRIBUTES, SEED, exam, moot, read, score
from benchmarks.nano.draw import COLOURS, Scene, draw, random_scene, sheet
from benchmarks.nano.export_omni import OMNI
from benchmarks.nano.model import images as model_images
from benchmarks.nano.model import speed_up
from benchmarks.nano.model_omni import OmniNano, images
from benchmarks.nano.restore import dense
from benchmarks.nano.train_omni import Task
from benchmarks.nano.train_vae import NanoVAE, mixed_precision, to_tensor
from benchmarks.nano.tune import base
from zimage_core import load_siglip, load_transformer

Row = dict[str, Any]
KINDS = ("colour open", "background open", "nothing open")
BATCH = 25
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


def shipped(folder: Path) -> tuple[OmniNano, NanoVAE]:
    """The sibling's files as it was trained."""
    nano, vae = base()
    model = OmniNano()
    model.load_state_dict(nano.state_dict(), strict=False)
    model.transformer.load_state_dict(dense(load_transformer(folder / "transformer.gguf"), ""))
    tower = dense(load_siglip(folder / "siglip.gguf"), "")
    named = {(f"encoder.{n}" if n.startswith("layers.") else n): w for n, w in tower.items()}
    model.siglip.load_state_dict(named)
    return model.eval(), vae


def right(task: Task, got: Scene) -> Row:
    """What an image has as the task wants it."""
    want = task.scene
    row: Row = {a: getattr(want, a) == getattr(got, a) for a in ATTRIBUTES if not moot(want, a)}
    row["everything"] = all(row.values())
    opened = [a for a, is_open in (("colour", task.colour), ("background", task.background)) if is_open]
    row["open"] = all(row[a] for a in opened) if opened else None
    row["all else"] = all(hit for a, hit in row.items() if a in ATTRIBUTES and a not in opened)
    return row


def references_exam(
    model: OmniNano, vae: NanoVAE, count: int
) -> tuple[dict[str, list[Row]], list[np.ndarray]]:
    """All kinds of tasks; the first with all ablations."""
    rows: dict[str, list[Row]] = {}
    shown: list[np.ndarray] = []
    for kind in KINDS:
        asked, rng = tasks(kind, count), np.random.default_rng((2031, KINDS.index(kind)))
        drawn = np.stack([draw(t.reference, rng) for t in asked])
        prompts = [t.prompt(rng, chinese=bool(k % 2)) for k, t in enumerate(asked)]
        for ablation in ABLATIONS if kind == KINDS[0] else ABLATIONS[:1]:
            made: list[np.ndarray] = []
            for start in range(0, count, BATCH):
                part = slice(start, start + BATCH)
                with torch.no_grad(), mixed_precision():
                    latents = vae.latents(to_tensor(drawn[part])).float()
                made += [
                    *images(
                        model, vae, prompts[part], torch.from_numpy(drawn[part]), latents, SEED + start,
                        latent=ablation in ("whole", "no features"),
                        features=ablation in ("whole", "no latents"),
                    )
                ]  # fmt: skip
            rows[f"{kind}, {ablation}"] = [right(t, read(m)) for t, m in zip(asked, made, strict=True)]
            print(f"{kind}, {ablation}:", share(rows[f"{kind}, {ablation}"], "open"), flush=True)
            if ablation == "whole":
                shown += [*drawn[:12], *made[:12]]
                print(*prompts[:12], sep="\n", flush=True)
    return rows, shown


def text_exam(model: OmniNano, vae: NanoVAE, count: int) -> dict[str, Any]:
    """The prompts of the accuracy table, without a reference, by the sibling."""
    scenes, prompts = exam(count)
    made = [
        image
        for start in range(0, count, BATCH)
        for image in model_images(model, vae, prompts[start : start + BATCH], SEED + start)
    ]
    return score(scenes, [read(image) for image in made])


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
    parser.add_argument("--assets", type=Path, default=OMNI)
    parser.add_argument("--prompts", type=int, default=200, help="prompts of text to image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, help="stem of the .json and .md files to write")
    parser.add_argument("--sheet", type=Path, help="write the first references and images of each kind here")
    args = parser.parse_args()
    speed_up()
    torch.set_num_threads(args.threads)
    model, vae = shipped(args.assets)
    rows, shown = references_exam(model, vae, args.count)
    report: dict[str, Any] = {"count": args.count, "references": rows, "prompts": args.prompts}
    report["text to image"] = text_exam(model, vae, args.prompts)
    print(markdown(report))
    if args.sheet:
        sheet(shown, columns=12).save(args.sheet)
    if args.to:
        args.to.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        raw = {**report, "references": {case: columns(found) for case, found in rows.items()}}
        args.to.with_suffix(".json").write_text(json.dumps(raw) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
