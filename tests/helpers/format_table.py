"""The table of docs/explanation/formats.md, from the descriptors; run as a module, it rewrites the page."""

from __future__ import annotations

from pathlib import Path

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.reference.dequantize import DEQUANTIZERS

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "formats.md"
BEGIN, END = "<!-- table: begin (generated) -->", "<!-- table: end -->"


def _row(fmt: BlockFormat) -> str:
    fields = " ".join(
        f"`{field.name}`@{fmt.offset(field.name)}:{field.code}"
        + (f" x {field.count}" if field.count > 1 else "")
        for field in fmt.fields
    )
    formula = (DEQUANTIZERS[fmt.name].__doc__ or "").splitlines()[0].rstrip(".")
    number = "-" if fmt.ggml_type is None else str(fmt.ggml_type)
    bits = f"{fmt.bits_per_weight:.4f}".rstrip("0").rstrip(".")
    return f"| {fmt.name} | {number} | {fmt.weights} | {fmt.nbytes} | {bits} | {fields} | {formula} |"


def render() -> str:
    """Head and one row a format, in the order of FORMATS."""
    head = "| format | GGUF type | weights | bytes | bits/weight | fields | value of a weight |"
    rule = "|---|---|---|---|---|---|---|"
    return "\n".join([head, rule, *map(_row, FORMATS.values())])


def current() -> str:
    """What the page says now."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{render()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
