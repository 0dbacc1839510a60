"""Read images without a human, and score the embedded model on prompts it was not trained on.

    python -m benchmarks.nano.check [--assets DIR] [--count 500] [--to benchmarks/results/nano_accuracy]

Reading takes no hint from the prompt. Background: the palette colour most common in the outer frame.
Colour: of the pixels farthest from the background. Then each pixel's share of ink gives a coverage
map, and the nearest of all masks that the drawing procedure can make (every shape, place, size,
count and glyph, with its jitter) names the rest. A map farther from every mask than `TOO_FAR` of
the mask's own energy is read as nothing at all, so that a blot scores as wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.nano.draw import (
    COLOURS,
    GLYPHS,
    POSITIONS,
    RADII,
    SHAPES,
    SIZE,
    Scene,
    centres,
    describe,
    draw,
    fonts_installed,
    glyph_mask,
    random_scene,
    shape_mask,
    sheet,
    shifted,
)

TOO_FAR = 0.5
FRAME = 4
FAINT = 30.0
"""Distance from the background, in RGB, below which no pixel is ink; colours are 82 apart or more."""
SEED = 20_000
"""Seed of the first image; image i has SEED + i."""
ATTRIBUTES = ("colour", "background", "shape", "position", "size", "count", "glyph")
PALETTE = np.array(list(COLOURS.values()), np.float32)
NAMES = list(COLOURS)


@dataclass(frozen=True)
class Templates:
    """masks [N, pixels] float32 at half size, squared [N], and what each shows."""

    masks: np.ndarray
    squared: np.ndarray
    scenes: list[Scene]


def _halved(mask: np.ndarray) -> np.ndarray:
    half = SIZE // 2
    return mask.reshape(half, 2, half, 2).mean((1, 3)).ravel()


@functools.cache
def templates(outline: bool = False) -> Templates:
    """Every mask of the procedure: 4,500 single shapes, 216 groups and, where the fonts are, 9 a glyph.

    With `outline`, the shapes are outlines; a ring's is the ring itself.
    """
    masks, scenes = [], []
    near, nearer = range(-2, 3), range(-1, 2)
    for shape in SHAPES:
        for size, radii in RADII.items():
            for radius, position, dx, dy in product(radii, POSITIONS, near, near):
                x, y = POSITIONS[position]
                masks.append(_halved(shifted(shape_mask(shape, radius, outline), x + dx, y + dy)))
                scenes.append(Scene("", "", shape, position, size))
        for count, radius, dx, dy in product((2, 3), RADII["small"], nearer, nearer):
            parts = [shifted(shape_mask(shape, radius, outline), x + dx, y + dy) for x, y in centres(count)]
            masks.append(_halved(np.maximum.reduce(parts)))
            scenes.append(Scene("", "", shape, size="small", count=count))
    for glyph, dx, dy in product(GLYPHS if fonts_installed() else "", nearer, nearer):
        masks.append(_halved(shifted(glyph_mask(glyph), dx, dy)))
        scenes.append(Scene("", "", glyph=glyph))
    stacked = np.stack(masks).astype(np.float32)
    return Templates(stacked, np.square(stacked).sum(1), scenes)


def nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """[..., 3] -> index into the palette [...]."""
    return np.square(rgb[..., None, :] - PALETTE).sum(-1).argmin(-1)


def ink(image: np.ndarray) -> tuple[str, str, np.ndarray]:
    """Colour, background and each pixel's share of ink [SIZE, SIZE] of an image [SIZE, SIZE, 3] uint8.

    The colour is "" where nothing stands out from the background.
    """
    pixels = image.astype(np.float32)
    frame = np.ones((SIZE, SIZE), bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    edge = pixels[frame]
    named = nearest_colour(edge)
    paper = int(np.bincount(named, minlength=len(NAMES)).argmax())
    paper_rgb = np.median(edge[named == paper], axis=0)
    distance = np.linalg.norm(pixels - paper_rgb, axis=-1)
    if distance.max() < FAINT:
        return "", NAMES[paper], np.zeros((SIZE, SIZE), np.float32)
    far = distance > 0.75 * distance.max()
    ink_rgb = np.median(pixels[far], axis=0)
    axis = ink_rgb - paper_rgb
    covered = np.clip((pixels - paper_rgb) @ axis / max(float(axis @ axis), 1.0), 0, 1)
    return NAMES[int(nearest_colour(ink_rgb))], NAMES[paper], covered


def nearest(covered: np.ndarray, known: Templates) -> tuple[Scene | None, float]:
    """The scene of the nearest mask, None if it is too far, and the squared distance to it."""
    seen = _halved(covered)
    gap = known.squared - 2 * (known.masks @ seen) + seen @ seen
    best = int(gap.argmin())
    return (None if gap[best] > TOO_FAR * known.squared[best] else known.scenes[best]), float(gap[best])


def read(image: np.ndarray, outline: bool = False) -> Scene:
    """What an image [SIZE, SIZE, 3] uint8 shows; empty fields where it shows nothing readable.

    With `outline`, the shape is compared with outlines too.
    """
    colour, background, covered = ink(image)
    if not colour:
        return Scene("", background, "", "", "", 0)
    scene, far = nearest(covered, templates())
    if outline:
        other, distance = nearest(covered, templates(outline=True))
        scene = other if distance < far else scene
    if scene is None or colour == background:
        return Scene(colour, background, "", "", "", 0)
    return replace(scene, colour=colour, background=background)


def moot(scene: Scene, attribute: str) -> bool:
    """Whether the scene's prompt says nothing about the attribute."""
    if scene.glyph:
        return attribute in ("shape", "position", "size", "count")
    if attribute == "glyph":
        return True
    return scene.count > 1 and attribute in ("position", "size")


def score(wanted: list[Scene], seen: list[Scene]) -> dict[str, dict[str, int]]:
    """Right and total per attribute, and of whole images."""
    table = {name: {"right": 0, "of": 0} for name in (*ATTRIBUTES, "everything")}
    for want, got in zip(wanted, seen, strict=True):
        asked = [a for a in ATTRIBUTES if not moot(want, a)]
        hits = [getattr(want, a) == getattr(got, a) for a in asked]
        for attribute, hit in zip((*asked, "everything"), (*hits, all(hits)), strict=True):
            table[attribute]["right"] += hit
            table[attribute]["of"] += 1
    return table


def exam(count: int) -> tuple[list[Scene], list[str]]:
    """Held-out scenes with their prompts, English and Chinese in turn; always the same."""
    rng = np.random.default_rng(2026)
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return scenes, [describe(s, rng, chinese=bool(k % 2)) for k, s in enumerate(scenes)]


def markdown(report: dict) -> str:
    """The table of a report."""
    lines = [
        "# Accuracy of the embedded model",
        "",
        f"{report['prompts']} prompts whose combination of attributes was held out of training, half",
        f"English, half Chinese, seeds {SEED} to {SEED + report['prompts'] - 1}, {report['steps']} steps,",
        "guidance 0, read by `benchmarks/nano/check.py`. The last two columns are the checker's own limits:",
        "images straight from the drawing procedure, and the same through the VAE's encoder and decoder.",
        "",
        "| attribute | asked | right | all | English | Chinese | drawings | through the VAE |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def percent(cell: dict[str, int]) -> str:
        return f"{100 * cell['right'] / cell['of']:.1f} %" if cell["of"] else "-"

    columns = ("all", "english", "chinese", "drawings", "vae")
    for name in (*ATTRIBUTES, "everything"):
        cells = [report["scores"][c][name] for c in columns]
        lines.append(
            f"| {name} | {cells[0]['of']} | {cells[0]['right']} | " + " | ".join(map(percent, cells)) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    from zimage_core import ZImagePipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("zimage_core/assets/nano"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--to", type=Path, help="stem of the .json and .md files to write")
    parser.add_argument("--sheet", type=Path, help="write the first 40 images here")
    args = parser.parse_args()
    pipe = ZImagePipeline.from_files(
        transformer=args.assets / "transformer.gguf",
        text_encoder=args.assets / "text_encoder.gguf",
        vae=args.assets / "vae.safetensors",
    )
    scenes, prompts = exam(args.count)
    rng = np.random.default_rng(5)
    drawings = [draw(s, rng) for s in scenes]
    began, made, again = time.time(), [], []
    for k, prompt in enumerate(prompts):
        made.append(np.asarray(pipe(prompt, seed=SEED + k).images[0]))
        with torch.no_grad():
            x = torch.from_numpy(drawings[k]).permute(2, 0, 1)[None].float() / 127.5 - 1
            y = pipe.vae.decode(pipe.vae.encode(x))[0].clamp(-1, 1)
        again.append(((y + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    seconds = time.time() - began
    seen = [read(p) for p in made]
    report = {
        "prompts": len(prompts),
        "steps": 8,
        "seconds": round(seconds, 1),
        "scores": {
            "all": score(scenes, seen),
            "english": score(scenes[::2], seen[::2]),
            "chinese": score(scenes[1::2], seen[1::2]),
            "drawings": score(scenes, [read(p) for p in drawings]),
            "vae": score(scenes, [read(p) for p in again]),
        },
        "wrong": [
            {"prompt": p, "seed": SEED + k, "asked": vars(want), "read": vars(got)}
            for k, (p, want, got) in enumerate(zip(prompts, scenes, seen, strict=True))
            if any(getattr(want, a) != getattr(got, a) for a in ATTRIBUTES if not moot(want, a))
        ],
    }
    print(markdown(report))
    if args.sheet:
        sheet(made[:40]).save(args.sheet)
    if args.to:
        args.to.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, ensure_ascii=False, indent=1)
        args.to.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        args.to.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
