"""Measure what the LoRA, the ControlNet, img2img and inpainting do with the embedded model.

    python -m benchmarks.nano.check_editing [--count 200] [--to benchmarks/results/nano_editing]
        [--only lora control img2img inpaint] [--sheets docs/images]

Every exam takes scenes that were held out of all training, prompts English and Chinese in turn, and fixed
seeds. `check.read` reads the images without a hint from the prompt. The rows that end in `ceiling` are
drawings of the wanted image through the VAE's encoder and decoder: better than them no image can be read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.nano.check import ATTRIBUTES, SEED, exam, ink, moot, nearest, read, templates
from benchmarks.nano.draw import (
    COLOURS,
    POSITIONS,
    RADII,
    SHAPES,
    SIZE,
    Scene,
    coverage,
    describe,
    draw,
    edges,
    paint,
    random_scene,
    sheet,
)
from zimage_core import ZImagePipeline
from zimage_core.assets import PARTS

Row = dict[str, Any]
WEIGHTS = (0.0, 0.5, 1.0)
STRENGTHS = (0.3, 0.5, 0.7, 1.0)
MARGINS = (4, 8)
"""Pixels by which a mask is larger than the largest object of its size; a latent spans 8."""
SHIFT, GROWTH = 2.5, 0.15
"""An object agrees with a control image if its centre is at most SHIFT pixels off, its extent GROWTH."""
SAME = 0.7
"""Its edges agree if the intersection of both masks is at least this share of their union."""
HALF = 0.5
"""Share of ink above which a pixel is ink."""


def array(images: Any) -> np.ndarray:
    """The one image of a result, uint8 [SIZE, SIZE, 3]."""
    return np.asarray(images.images[0])


@torch.no_grad()
def through_vae(pipe: ZImagePipeline, image: np.ndarray) -> np.ndarray:
    """An image encoded and decoded."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    y = pipe.vae.decode(pipe.vae.encode(x))[0].clamp(-1, 1)
    out: np.ndarray = ((y + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return out


def right(want: Scene, got: Scene) -> dict[str, bool]:
    """Which attributes that the prompt names are as wanted."""
    return {a: getattr(want, a) == getattr(got, a) for a in ATTRIBUTES if not moot(want, a)}


def share(rows: list[Row], key: str) -> str:
    """How many rows that have the key are true in it."""
    found = [bool(row[key]) for row in rows if row.get(key) is not None]
    return f"{100 * np.mean(found):.1f} % of {len(found)}" if found else "-"


def singles(count: int, seed: int) -> list[Scene]:
    """Held-out scenes with one shape."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        scene = random_scene(rng, held_out=True, glyphs=0.0, counts=0.0)
        found.append(scene)
    return found


def open_prompt(scene: Scene, k: int) -> str:
    """A prompt that says colours and shape, but neither place nor size."""
    bare = replace(scene, position="", size="")
    return describe(bare, np.random.default_rng((7, k)), chinese=bool(k % 2))


# the LoRA


def styled(want: Scene, image: np.ndarray) -> Row:
    """What is right in an image, whether its shape is an outline and whether it has a hole."""
    _, _, covered = ink(image)
    row: Row = right(want, read(image, outline=True))
    row["shape and colour"] = row["colour"] and row["background"] and row.get("shape", row.get("glyph"))
    if want.glyph or want.shape == "ring":
        return row
    row["outline"] = nearest(covered, templates(outline=True))[1] < nearest(covered, templates())[1]
    if want.count == 1 and covered.sum() > 0:
        y, x = (round(float((axis * covered).sum() / covered.sum())) for axis in np.mgrid[:SIZE, :SIZE])
        row["hole"] = bool(covered[y - 1 : y + 2, x - 1 : x + 2].mean() < HALF)
    return row


def lora_exam(pipe: ZImagePipeline, count: int) -> tuple[dict[str, list[Row]], list[np.ndarray]]:
    """The prompts of the accuracy table with the LoRA at several weights."""
    scenes, prompts = exam(count)
    rows: dict[str, list[Row]] = {}
    shown: list[np.ndarray] = []
    pipe.load_lora(PARTS["outline"], name="outline")
    for weight in WEIGHTS:
        pipe.set_adapters(["outline"], [weight])
        made = [array(pipe(p, seed=SEED + k)) for k, p in enumerate(prompts)]
        rows[f"weight {weight:g}"] = [styled(s, m) for s, m in zip(scenes, made, strict=True)]
        shown += made[:12]
    pipe.unload_lora("outline")
    rng = np.random.default_rng(5)
    drawn = [through_vae(pipe, draw(s, rng, outline=True)) for s in scenes]
    rows["ceiling"] = [styled(s, m) for s, m in zip(scenes, drawn, strict=True)]
    return rows, shown


# the ControlNet


def extent(mask: np.ndarray) -> tuple[float, float, float]:
    """Centre (y, x) and root of the area of a boolean mask."""
    ys, xs = np.nonzero(mask)
    return (float(ys.mean()), float(xs.mean()), len(ys) ** 0.5) if len(ys) else (-1e9, -1e9, 1e-9)


def agreement(scene: Scene, mask: np.ndarray, image: np.ndarray) -> Row:
    """How an image agrees with the coverage whose edges controlled it."""
    colour, background, covered = ink(image)
    want, got = mask > HALF, covered > HALF
    (y, x, side), (v, u, other) = extent(want), extent(got)
    row: Row = {
        "colours": (colour, background) == (scene.colour, scene.background),
        "off": round(min(float(np.hypot(y - v, x - u)), float(SIZE)), 2),
        "growth": round(other / side - 1, 3),
        "iou": round(float((want & got).sum() / max((want | got).sum(), 1)), 3),
    }
    row["edges"] = row["iou"] >= SAME
    row["place"], row["size"] = row["off"] <= SHIFT, abs(row["growth"]) <= GROWTH
    row["place and size"] = row["place"] and row["size"]
    row["everything"] = row["place and size"] and row["colours"]
    return row


def control_exam(pipe: ZImagePipeline, count: int) -> tuple[dict[str, list[Row]], list[np.ndarray]]:
    """Prompts without place and size; edges of scenes at the known places, and anywhere."""
    rows: dict[str, list[Row]] = {}
    shown: list[np.ndarray] = []
    rng = np.random.default_rng(11)
    scenes = singles(count, 2027)
    prompts = [open_prompt(scene, k) for k, scene in enumerate(scenes)]
    without = [array(pipe(prompt, seed=SEED + k)) for k, prompt in enumerate(prompts)]
    pipe.load_controlnet(PARTS["edges"])
    for where, anywhere in (("five places", False), ("anywhere", True)):
        masks = [coverage(s, rng, anywhere=anywhere) for s in scenes]
        lines = [Image.fromarray(edges(m)) for m in masks]
        made = [
            array(pipe(prompt, seed=SEED + k, control_image=line))
            for k, (prompt, line) in enumerate(zip(prompts, lines, strict=True))
        ]
        drawn = [through_vae(pipe, paint(s, m, rng)) for s, m in zip(scenes, masks, strict=True)]
        for name, images in (("no control", without), ("control", made), ("ceiling", drawn)):
            rows[f"{where}, {name}"] = [agreement(*each) for each in zip(scenes, masks, images, strict=True)]
        shown += [*map(np.asarray, lines[:12]), *without[:12], *made[:12]]
    pipe.unload_controlnet()
    return rows, shown


# img2img and inpainting


def another(scene: Scene, rng: np.random.Generator) -> str:
    """A colour that the scene does not have."""
    return str(rng.choice([c for c in COLOURS if c not in (scene.colour, scene.background)]))


def img2img_exam(pipe: ZImagePipeline, count: int) -> tuple[dict[str, list[Row]], list[np.ndarray]]:
    """A drawing is given with its prompt in another colour; "no image" is that prompt alone.

    The model takes a prompt without a place for one that means the middle, so the prompts say all they can.
    """
    rng = np.random.default_rng(13)
    scenes = singles(count, 2028)
    masks = [coverage(s, rng) for s in scenes]
    drawings = [paint(s, m, rng) for s, m in zip(scenes, masks, strict=True)]
    wanted = [replace(s, colour=another(s, rng)) for s in scenes]
    rows: dict[str, list[Row]] = {}
    shown = drawings[:12]
    for strength in STRENGTHS:
        found = []
        for k, (scene, mask, drawing) in enumerate(zip(wanted, masks, drawings, strict=True)):
            prompt = describe(scene, np.random.default_rng((7, k)), chinese=bool(k % 2))
            given = {"image": Image.fromarray(drawing), "strength": strength} if strength < 1 else {}
            image = array(pipe(prompt, seed=SEED + k, **given))
            row, got = agreement(scene, mask, image), read(image)
            row["new colour"] = got.colour == scene.colour
            row["shape"] = got.shape == scene.shape
            row["shape, place and size kept"] = row["shape"] and row["place and size"]
            row["both"] = row["new colour"] and row["shape, place and size kept"]
            found.append(row)
            shown += [image] if k < 12 else []
        rows[f"strength {strength:g}" if strength < 1 else "no image"] = found
    return rows, shown


def inpaint_exam(pipe: ZImagePipeline, count: int) -> tuple[dict[str, list[Row]], list[np.ndarray]]:
    """A box around the object is repainted; the prompt asks for another colour and shape in its place."""
    rows: dict[str, list[Row]] = {}
    shown: list[np.ndarray] = []
    scenes = singles(count, 2029)
    for margin in MARGINS:
        rng, made, found = np.random.default_rng(17), [], []
        for k, scene in enumerate(scenes):
            drawing = draw(scene, rng)
            shape = str(rng.choice([s for s in SHAPES if s != scene.shape]))
            want = replace(scene, colour=another(scene, rng), shape=shape)
            x, y = (SIZE // 2 + offset for offset in POSITIONS[scene.position])
            half = RADII[scene.size][-1] + margin
            mask = Image.new("L", (SIZE, SIZE))
            ImageDraw.Draw(mask).rectangle([x - half, y - half, x + half - 1, y + half - 1], fill=255)
            prompt = describe(want, np.random.default_rng((8, k)), chinese=bool(k % 2))
            given = {"image": Image.fromarray(drawing), "mask_image": mask, "strength": 1.0}
            image = array(pipe(prompt, seed=SEED + k, **given))
            keep = np.asarray(mask) == 0
            row: Row = right(want, read(image))
            row["outside untouched"] = bool((image[keep] == drawing[keep]).all())
            row["inside as asked"] = all(row[a] for a in ("colour", "shape", "position", "size"))
            row["both"] = row["outside untouched"] and row["inside as asked"]
            found.append(row)
            made.append((drawing, np.repeat(np.asarray(mask)[:, :, None], 3, 2), image))
        rows[f"{margin} pixels around"] = found
        shown += [image for images in zip(*made[:12], strict=True) for image in images]
    return rows, shown


MEASURED = ("iou", "off")
"""Keys whose median is shown: intersection over union, and pixels between the centres."""
EXAMS: dict[
    str, tuple[str, Callable[..., tuple[dict[str, list[Row]], list[np.ndarray]]], tuple[str, ...]]
] = {
    "lora": (
        "LoRA `outline`",
        lora_exam,
        ("outline", "hole", "colour", "shape", "position", "size", "count", "glyph", "shape and colour"),
    ),
    "control": (
        "ControlNet `edges`, prompts without place and size",
        control_exam,
        ("place", "size", "place and size", "colours", "everything", "edges", "iou", "off"),
    ),
    "img2img": (
        "img2img, the drawing's prompt with another colour",
        img2img_exam,
        ("new colour", "shape", "place", "size", "shape, place and size kept", "both", "iou", "off"),
    ),
    "inpaint": (
        "inpainting, another shape and colour inside the mask",
        inpaint_exam,
        ("outside untouched", "colour", "shape", "position", "size", "inside as asked", "both"),
    ),
}


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report."""
    lines = [
        "# What adapters and editing do with the embedded model",
        "",
        *(__doc__ or "").split("\n\n")[2].splitlines(),
    ]
    for name, rows in report["exams"].items():
        title, _, keys = EXAMS[name]
        lines += [
            "",
            f"## {title}",
            "",
            "| " + " | ".join(("case", *keys)) + " |",
            "| --- " * (len(keys) + 1) + "|",
        ]
        for case, found in rows.items():
            cells = [
                f"{np.median([row[key] for row in found]):.2f}" if key in MEASURED else share(found, key)
                for key in keys
            ]
            lines.append("| " + " | ".join((case, *cells)) + " |")
    return "\n".join(lines) + "\n"


def columns(rows: list[Row]) -> dict[str, list[Any]]:
    """Rows as lists by key: truth values as 0 and 1, null where a row lacks the key."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [int(v) if isinstance(v := row.get(key), bool) else v for row in rows] for key in keys}


def rows_of(table: dict[str, list[Any]]) -> list[Row]:
    """`columns` undone."""
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def kept(path: Path) -> dict[str, dict[str, list[Row]]]:
    """The exams of a report that was written before."""
    if not path.exists():
        return {}
    exams = json.loads(path.read_text("utf-8"))["exams"]
    return {name: {case: rows_of(t) for case, t in cases.items()} for name, cases in exams.items()}


def write(report: dict[str, Any], stem: Path) -> None:
    """Write the raw results and the tables."""
    lines = []
    for name, cases in report["exams"].items():
        inner = (f"  {json.dumps(case)}: {json.dumps(columns(rows))}" for case, rows in cases.items())
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n }")
    text = f'{{"count": {report["count"]}, "exams": {{\n' + ",\n".join(lines) + "\n}}\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", nargs="*", choices=list(EXAMS), default=list(EXAMS))
    parser.add_argument("--to", type=Path, help="stem of the .json and .md files to write")
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of each exam's first images")
    args = parser.parse_args()
    pipe = ZImagePipeline.from_default()
    exams = kept(args.to.with_suffix(".json")) if args.to else {}  # what is not run again keeps its rows
    report: dict[str, Any] = {"count": args.count, "exams": exams}
    for name in args.only:
        exams[name], shown = EXAMS[name][1](pipe, args.count)
        if args.sheets:
            sheet(shown, columns=min(12, args.count)).save(args.sheets / f"nano_{name}.png")
    print(markdown(report))
    if args.to:
        write(report, args.to)


if __name__ == "__main__":
    main()
