"""A comparison to look at: a contact sheet, and a page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from zimage_core.files import png
from zimage_core.files.units import in_seconds
from zimage_core.study.comparison import Comparison, PicturePair

if TYPE_CHECKING:
    from PIL.Image import Image

GAIN = 8
"""How much differences are amplified where they are shown as a picture."""
MOST_ROWS = 32
"""Pictures of a sheet."""
BAND = 20
"""Pixels for a line of text."""
MARGIN = 4
SMALLEST = 160
"""Pictures narrower than this are enlarged by a whole factor on a sheet."""
COLOURS = ("#3b6ea8", "#d1495b", "#6aa56a", "#c98a1b")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 70, 40  # of a chart


def contact_sheet(comparison: Comparison) -> Image:
    """A, B and their difference (times 8, grey is none) side by side, a row a picture, at most 32."""
    from PIL import Image, ImageDraw

    pairs = comparison.pictures[:MOST_ROWS]
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
        for column, picture in enumerate((pair.a, pair.b, difference(pair))):
            large = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (MARGIN + column * (width + MARGIN), top))
        pen.text((MARGIN, top + height + 2), _fit(f"{pair.seed}: {pair.prompt}", 3 * width), fill="black")
        pen.text((MARGIN, top + height + BAND), f"PSNR {_db(pair.psnr)}, SSIM {pair.ssim:.4f}", fill="black")
    return sheet


def difference(pair: PicturePair) -> np.ndarray[Any, Any]:
    """B - A, amplified around grey: uint8 [H, W, 3]."""
    far: np.ndarray[Any, Any] = (pair.b.astype(np.int16) - pair.a) * GAIN + 128
    shown: np.ndarray[Any, Any] = far.clip(0, 255).astype(np.uint8)
    return shown


def sheet_png(comparison: Comparison) -> bytes:
    """The contact sheet as a file."""
    return png.encode(contact_sheet(comparison))


def html(comparison: Comparison) -> str:
    """The report: figures, charts of steps and blocks, pictures; nothing is loaded from elsewhere."""
    title = " against ".join(reversed(comparison.labels))
    parts = [f"<h1>{escape(title)}</h1>", _figures(comparison)]
    if comparison.steps:
        parts += ["<h2>Steps</h2>", _steps(comparison)]
    if comparison.blocks:
        parts += ["<h2>Blocks</h2>", _blocks(comparison)]
    parts += ["<h2>Pictures</h2>", *map(_picture, comparison.pictures)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{font:14px sans-serif;margin:2em;max-width:60em}td,th{padding:2px 10px;text-align:right}"
        "img{image-rendering:pixelated;width:32%;max-width:512px}svg{font-size:12px}</style>"
        f"{''.join(parts)}</html>\n"
    )


def _figures(c: Comparison) -> str:
    velocity = "-" if c.velocity is None else f"{c.velocity:.3%}"
    rows = [
        ("pictures", str(len(c.pictures))),
        ("PSNR, from the mean squared error of all", _db(c.psnr)),
        ("SSIM, mean", f"{c.ssim:.4f}"),
        ("error of the velocity on A's latents", velocity),
        *((f"{label} took", in_seconds(time)) for label, time in zip(c.labels, c.seconds, strict=True)),
    ]
    return _table((), rows)


def _steps(c: Comparison) -> str:
    lines = {
        "velocity on A's latents": [s.velocity for s in c.steps],
        "latents, each on its own way": [s.latents for s in c.steps],
    }
    table = [(str(s.step + 1), f"{s.sigma:.3f}", f"{s.velocity:.3%}", f"{s.latents:.3%}") for s in c.steps]
    head = ("step", "noise level", "velocity", "latents")
    return chart(lines, [str(s.step + 1) for s in c.steps], "step") + _table(head, table)


def _blocks(c: Comparison) -> str:
    names = list(dict.fromkeys(b.block for b in c.blocks))
    steps = sorted({b.step for b in c.blocks})
    found = {(b.block, b.step): b for b in c.blocks}
    parts = []
    for kind, text in (
        ("own", "Each block on A's input, relative to what it adds"),
        ("stream", "The stream behind each block, from the same latents"),
    ):
        lines = {
            f"step {step + 1}": [
                getattr(found[name, step], kind) if (name, step) in found else math.nan for name in names
            ]
            for step in steps
        }
        parts.append(f"<p>{text}</p>" + chart(lines, names, "block"))
    return "".join(parts)


def chart(lines: Mapping[str, Sequence[float]], names: Sequence[str], axis: str) -> str:
    """Curves over named places as SVG, on a logarithmic axis; points that are 0 or NaN are left out.

    Args:
        lines: Name -> a value for each place.
        names: Of the places.
        axis: What the places are.
    """
    values = [v for line in lines.values() for v in line if 0 < v < math.inf]
    if not values:
        return "<p>No difference.</p>"
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(i: int) -> float:
        return _LEFT + (_WIDTH - _LEFT) * (i + 0.5) / len(names)

    def y(value: float) -> float:
        return (_HEIGHT - _BOTTOM) * (1 - (math.log10(value) - low) / (high - low)) + 8

    parts = [_gridline(y(10.0**e), f"{10.0**e:g}") for e in range(low, high + 1)]
    every = -(-len(names) // 12)
    parts += [
        f'<text x="{x(i):.0f}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(names[i])}</text>'
        for i in range(0, len(names), every)
    ]
    parts.append(f'<text x="{_WIDTH}" y="{_HEIGHT}" text-anchor="end">{escape(axis)}</text>')
    for colour, line in zip(_cycle(len(lines)), lines.values(), strict=True):
        places = [(x(i), y(v)) for i, v in enumerate(line) if 0 < v < math.inf]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in places]
    legend = " ".join(
        f'<span style="color:{colour}">&#9632;</span> {escape(name)} '
        for colour, name in zip(_cycle(len(lines)), lines, strict=True)
    )
    return f'<svg width="{_WIDTH}" height="{_HEIGHT + 4}">{"".join(parts)}</svg><div>{legend}</div>'


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _gridline(y: float, text: str) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _picture(pair: PicturePair) -> str:
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{_inline(picture)}"> '
        for name, picture in (("A", pair.a), ("B", pair.b), ("difference", difference(pair)))
    )
    text = f"{pair.prompt} (seed {pair.seed}): PSNR {_db(pair.psnr)}, SSIM {pair.ssim:.4f}"
    return f"<p>{escape(text)}<br>{images}</p>"


def _inline(picture: np.ndarray[Any, Any]) -> str:
    from PIL import Image

    return base64.b64encode(png.encode(Image.fromarray(picture))).decode("ascii")


def _db(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "equal"


def _fit(text: str, width: int) -> str:
    """Cut to about `width` pixels, in characters that the built-in font of Pillow has."""
    most = max(4, width // 6)
    shown = text.encode("latin-1", "replace").decode("latin-1")
    return shown if len(shown) <= most else shown[: most - 3] + "..."
