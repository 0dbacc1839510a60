"""Pictures of blocks for docs/explanation/quants.md, drawn from the descriptors: a cell is a byte.

    python -m tests.helpers.block_pictures      # writes docs/images/blocks/*.svg

Which bits a weight is read from is found by trial, not written down: a bit belongs to the weight if
flipping it changes what the reference reads for that weight.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from zimage_core.formats import FORMATS, BlockFormat, Field
from zimage_core.reference.dequantize import dequantize
from zimage_core.reference.encode import random_blocks

FOLDER = Path(__file__).parents[2] / "docs" / "images" / "blocks"
PICTURES = {"Q4_0": 20, "Q8_0": 20, "Q4_K": 100, "Q6_K": 100, "IQ4_XS": 100, "IQ2_XXS": 100}
"""The formats, and the weight of the block whose bits are marked."""
CODES, SCALES, FLOATS = "codes", "scales", "floats"
COLOURS = {FLOATS: ("#e3a36b", "#b5642a"), SCALES: ("#8cc2a4", "#2f7d57"), CODES: ("#9db8e0", "#2b5da8")}
"""Fill of a byte, and of a bit that the marked weight is read from."""
CELL, GAP, ROW, LEFT = 20, 2, 32, 12
STYLE = (
    ".card{fill:#ffffff;stroke:#d0d7de}.ink{fill:#1f2328}"
    "@media(prefers-color-scheme:dark){.card{fill:#161b22;stroke:#30363d}.ink{fill:#e6edf3}}"
    "text{font-family:system-ui,sans-serif;font-size:13px}.head{font-size:15px;font-weight:600}"
)


def kind(field: Field) -> str:
    """The colour of a field: a float for the block, scales of its sub-blocks, or codes of weights."""
    if field.code == "f2":
        return FLOATS
    return SCALES if field.name.startswith("scales") else CODES


def bits_of(fmt: BlockFormat, weight: int, trials: int = 64) -> list[int]:
    """Numbers of the bits that `weight` depends on; bit b of byte n is 8 n + b, the lowest bit being 0."""
    found = np.zeros(8 * fmt.nbytes, bool)
    for seed in range(trials):
        block = random_blocks(fmt, (fmt.weights,), np.random.default_rng(seed)).reshape(fmt.nbytes)
        flipped = np.repeat(block[None], 8 * fmt.nbytes, axis=0)
        numbers = np.arange(8 * fmt.nbytes)
        flipped[numbers, numbers // 8] ^= (1 << (numbers % 8)).astype(np.uint8)
        with np.errstate(all="ignore"):
            found |= dequantize(flipped, fmt)[:, weight] != dequantize(block[None], fmt)[0, weight]
    return np.flatnonzero(found).tolist()


def _counts(fmt: BlockFormat, bits: list[int]) -> dict[str, int]:
    """How many bits of each field are among `bits`."""
    ranges = {f.name: (8 * fmt.offset(f.name), 8 * (fmt.offset(f.name) + f.nbytes)) for f in fmt.fields}
    return {name: sum(low <= bit < high for bit in bits) for name, (low, high) in ranges.items()}


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def describe(name: str) -> str:
    """What the picture shows, in words."""
    fmt, weight = FORMATS[name], PICTURES[name]
    fields = []
    for field in fmt.fields:
        first = fmt.offset(field.name)
        fields.append(f"{field.name} in bytes {first} to {first + field.nbytes - 1}")
    bits = {field: n for field, n in _counts(fmt, bits_of(fmt, weight)).items() if n}
    read = ", ".join(f"{_plural(n, 'bit')} of {field}" for field, n in bits.items())
    return (
        f"A block of {name}: {fmt.weights} weights in {fmt.nbytes} bytes, "
        f"{fmt.bits_per_weight:g} bits a weight. {'; '.join(fields)}. Weight {weight} is read from {read}."
    )


def draw(name: str) -> str:
    """The SVG of a format in PICTURES."""
    fmt, weight = FORMATS[name], PICTURES[name]
    bits = bits_of(fmt, weight)
    owner = [field for field in fmt.fields for _ in range(field.nbytes)]
    shapes = []
    for byte, field in enumerate(owner):
        x, y = LEFT + byte % ROW * (CELL + GAP), 40 + byte // ROW * (CELL + GAP)
        fill, mark = COLOURS[kind(field)]
        shapes.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}"/>')
        for bit in (b % 8 for b in bits if b // 8 == byte):
            at = x + (7 - bit) * CELL / 8  # the highest bit is on the left, as numbers are written
            shapes.append(f'<rect x="{at:g}" y="{y}" width="{CELL / 8:g}" height="{CELL}" fill="{mark}"/>')
    y = 40 + -(-fmt.nbytes // ROW) * (CELL + GAP) + 18
    legend, x = [], LEFT
    counts = _counts(fmt, bits)
    for field in fmt.fields:
        of = counts[field.name]
        said = f"{field.name}: {_plural(field.nbytes, 'byte')}, {of} bits for weight {weight}"
        if x + 30 + 7 * len(said) > LEFT + ROW * (CELL + GAP):
            x, y = LEFT, y + 22
        legend.append(f'<rect x="{x}" y="{y - 11}" width="13" height="13" fill="{COLOURS[kind(field)][0]}"/>')
        legend.append(f'<text class="ink" x="{x + 19}" y="{y}">{escape(said)}</text>')
        x += 36 + 7 * len(said)
    width, height = 2 * LEFT + ROW * (CELL + GAP) - GAP, y + 16
    head = f"{name}: {fmt.weights} weights, {fmt.nbytes} bytes, {fmt.bits_per_weight:g} bits a weight"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
            f' height="{height}" role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(head)}</title>',
            f'<desc id="d">{escape(describe(name))}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            f'<text class="ink head" x="{LEFT}" y="26">{escape(head)}</text>',
            *shapes,
            *legend,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name.lower()}.svg").write_text(draw(name), encoding="utf-8")


if __name__ == "__main__":
    main()
