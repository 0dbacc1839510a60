"""Reports of a comparison: a contact sheet, and a self-contained page of HTML."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from zimage_core.files import png
from zimage_core.files.units import in_seconds
from zimage_core.study.comparison import Comparison, ImagePair

if TYPE_CHECKING:
    from PIL.Image import Image

GAIN = 8
"""Factor by which differences are amplified in images."""
MOST_ROWS = 32
"""Most rows of a sheet."""
BAND = 20
"""Height of a line of text in pixels."""
MARGIN = 4
SMALLEST = 160
"""Images narrower than this are enlarged by a whole factor on a sheet."""
COLOURS = ("#3b6ea8", "#d1495b", "#6aa56a", "#c98a1b")
_WIDTH, _HEIGHT, _LEFT = 640, 200, 70  # size of a chart in pixels, and the space left of its curves


def contact_sheet(comparison: Comparison) -> Image:
    """A, B and their difference (times 8, around grey) side by side, one row per image, at most 32 rows."""
    from PIL import Image, ImageDraw

    pairs = comparison.images[:MOST_ROWS]
    height, width = pairs[0].a.shape[:2]
    scale = max(1, -(-SMALLEST // width))
    height, width = height * scale, width * scale
    row = height + 2 * BAND + MARGIN
    sheet = Image.new("RGB", (3 * (width + MARGIN) + MARGIN, BAND + row * len(pairs)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate((*comparison.labels, f"difference x {GAIN}")):
        pen.text((MARGIN + column * (width + MARGIN), 4), _fit(label, width), fill="black")
    for i, pair in enumerate(pairs):
        top = BAND + i * row
        for column, image in enumerate((pair.a, pair.b, difference(pair))):
            large = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (MARGIN + column * (width + MARGIN), top))
        pen.text((MARGIN, top + height + 2), _fit(_caption(i, pair), 3 * width), fill="black")
        pen.text((MARGIN, top + height + BAND), f"PSNR {_db(pair.psnr)}, SSIM {pair.ssim:.4f}", fill="black")
    return sheet


def legend(comparison: Comparison) -> list[str]:
    """The rows of a contact sheet whose prompts it has no letters for, each as a line of text."""
    rows = enumerate(comparison.images[:MOST_ROWS])
    return [f"row {i + 1}: seed {p.seed}, {p.prompt}" for i, p in rows if not _has_letters(p.prompt)]


def _caption(row: int, pair: ImagePair) -> str:
    prompt = pair.prompt if _has_letters(pair.prompt) else f"the prompt of row {row + 1}, see the legend"
    return f"{pair.seed}: {prompt}"


def _has_letters(text: str) -> bool:
    """Whether Pillow's built-in font can write a text: it has Latin letters only."""
    return all(ord(character) < 256 for character in text)


def difference(pair: ImagePair) -> np.ndarray[Any, Any]:
    """B - A, amplified around grey: uint8 [H, W, 3]."""
    far: np.ndarray[Any, Any] = (pair.b.astype(np.int16) - pair.a) * GAIN + 128
    shown: np.ndarray[Any, Any] = far.clip(0, 255).astype(np.uint8)
    return shown


def sheet_png(comparison: Comparison) -> bytes:
    """The contact sheet as a PNG file."""
    return png.encode(contact_sheet(comparison))


def html(comparison: Comparison) -> str:
    """The page of HTML: numbers, charts of steps and blocks, images."""
    title = " against ".join(reversed(comparison.labels))
    parts = [f"<h1>{escape(title)}</h1>", _figures(comparison)]
    if comparison.steps:
        parts += ["<h2>Steps</h2>", _steps(comparison)]
    if comparison.blocks:
        parts += ["<h2>Blocks</h2>", _blocks(comparison)]
    parts += ["<h2>Images</h2>", *map(_images, comparison.images)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{font:14px sans-serif;margin:2em;max-width:60em}td{padding:2px 10px;text-align:right}"
        "img{image-rendering:pixelated;width:32%;max-width:512px}svg{font-size:12px}</style>"
        f"{''.join(parts)}</html>\n"
    )


def _figures(c: Comparison) -> str:
    rows = [
        ("images", str(len(c.images))),
        ("PSNR, from the mean squared error of all", _db(c.psnr)),
        ("SSIM, mean", f"{c.ssim:.4f}"),
        ("error of the velocity on A's latents", "-" if c.velocity is None else f"{c.velocity:.3%}"),
        *((f"{label} took", in_seconds(time)) for label, time in zip(c.labels, c.seconds, strict=True)),
    ]
    return _table(rows)


def _steps(c: Comparison) -> str:
    lines = {
        "velocity on A's latents": [s.velocity for s in c.steps],
        "latents, each on its own way": [s.latents for s in c.steps],
    }
    rows = [(str(s.step + 1), f"{s.sigma:.3f}", f"{s.velocity:.3%}", f"{s.latents:.3%}") for s in c.steps]
    chart = _chart(lines, [str(s.step + 1) for s in c.steps])
    return chart + _table([("step", "noise level", "velocity", "latents"), *rows])


def _blocks(c: Comparison) -> str:
    names = list(dict.fromkeys(b.block for b in c.blocks))
    found = {(b.block, b.step): b for b in c.blocks}
    parts = []
    for kind, text in (
        ("own", "Each block on A's input, relative to what it adds"),
        ("stream", "The stream behind each block, from the same latents"),
    ):
        lines = {
            f"step {step + 1}": [getattr(found.get((name, step)), kind, math.nan) for name in names]
            for step in sorted({b.step for b in c.blocks})
        }
        parts.append(f"<p>{text}</p>{_chart(lines, names)}")
    return "".join(parts)


def _chart(lines: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Curves as SVG over named positions, with a logarithmic axis; points that are 0 or NaN are left out."""
    values = [v for line in lines.values() for v in line if 0 < v < math.inf]
    if not values:
        return "<p>No difference.</p>"
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)

    def x(i: int) -> int:
        return round(_LEFT + (_WIDTH - _LEFT) * (i + 0.5) / len(names))

    def y(exponent: float) -> int:
        return round(10 + (_HEIGHT - 40) * (high - exponent) / (high - low))

    parts = [f'<text x="0" y="{y(e)}">{10.0**e:g}</text>' for e in range(low, high + 1)]
    for i in range(0, len(names), -(-len(names) // 12)):
        parts.append(f'<text x="{x(i)}" y="{_HEIGHT}" text-anchor="middle">{escape(names[i])}</text>')
    legend = ""
    for colour, (name, line) in zip(cycle(COLOURS), lines.items(), strict=False):
        points = [(x(i), y(math.log10(v))) for i, v in enumerate(line) if 0 < v < math.inf]
        path = " ".join(f"{px},{py}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px}" cy="{py}" r="3" fill="{colour}"/>' for px, py in points]
        legend += f' <span style="color:{colour}">&#9632;</span> {escape(name)}'
    return f'<svg width="{_WIDTH}" height="{_HEIGHT + 4}">{"".join(parts)}</svg><div>{legend}</div>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{body}</table>"


def _images(pair: ImagePair) -> str:
    from PIL import Image

    images = ""
    for name, pixels in (("A", pair.a), ("B", pair.b), ("difference", difference(pair))):
        data = base64.b64encode(png.encode(Image.fromarray(pixels))).decode("ascii")
        images += f'<img alt="{name}" src="data:image/png;base64,{data}"> '
    text = f"{pair.prompt} (seed {pair.seed}): PSNR {_db(pair.psnr)}, SSIM {pair.ssim:.4f}"
    return f"<p>{escape(text)}<br>{images}</p>"


def _db(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "equal"


def _fit(text: str, width: int) -> str:
    """Text cut to about `width` pixels, with characters that Pillow's built-in font has."""
    most = max(4, width // 6)
    shown = text.encode("latin-1", "replace").decode("latin-1")
    return shown if len(shown) <= most else shown[: most - 3] + "..."
