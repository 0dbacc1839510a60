"""The generated tables of the docs: made from the committed results, put between their markers.

    python -m benchmarks.tables

This measures nothing. The table of docs/explanation/numerics.md is written by `python -m benchmarks.parity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import batch, decoding, overview, standing, ulysses, ulysses_model
from benchmarks.predictions import text
from benchmarks.report import ROOT, compiled_rows, fill_tables, markdown, read
from benchmarks.step_model import Range
from zimage_core.formats import by_name
from zimage_core.quantize.encode import ENCODERS

Rows = Sequence[Mapping[str, Any]]
KINDS = ("gaussian", "student", "real")
"""Weights that the encoders' errors are of."""
HOW = ("plain", "rotated")
"""Products of int8 without and with a rotation of both operands."""
SPEED_ROWS = 1024
"""Rows of the matrix whose speed is shown, where it was measured."""


def bits(fmt: str) -> float:
    """Stored bits of a weight."""
    block = by_name(fmt)
    return 8 * block.nbytes / block.weights


def nano(report: Mapping[str, Any]) -> str:
    """A row a type, the most bits first; each cell without / with the importance matrix."""
    results = report["results"]
    rows = []
    for fmt in sorted((n for n in results if "+" not in n), key=lambda n: (-bits(n), n)):
        pair = [results[n] for n in (fmt, f"{fmt}+imatrix") if n in results]
        cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "weights": lambda r: f"{100 * r['weights']:.3g} %",
            "velocity": lambda r: f"{100 * r['velocity']:.3g} %",
            "psnr": lambda r: "equal" if r["psnr"] is None else f"{r['psnr']:.1f}",
            "ssim": lambda r: f"{r['ssim']:.4f}",
            "right": lambda r: f"{100 * r['right'] / r['of']:.0f} %",
        }
        shown = (" / ".join(map(cell, pair)) for cell in cells.values())
        rows.append([fmt, f"{bits(fmt):.4g}", f"{pair[0]['bytes'] / 1e6:.2f} MB", *shown])
    return markdown("type | bits | file | weights | velocity | PSNR, dB | SSIM | right", rows)


def full(report: Mapping[str, Any]) -> str:
    """A row a type: size of a 6B file and error of random weights of its shapes."""
    rows = (
        [fmt, f"{bits(fmt):.4g}", f"{row['bytes'] / 1e9:.2f} GB"]
        + [f"{100 * row[kind]:.3g} %" for kind in ("gauss", "student")]
        for fmt, row in sorted(report["random"].items(), key=lambda item: (-bits(item[0]), item[0]))
    )
    return markdown("type | bits | 6B file | Gaussian | Student's t", rows)


def choice(report: Mapping[str, Any]) -> str:
    """A row a type that one would choose: its size in the 6B model, and its errors."""
    rows = []
    for fmt in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ3_S", "Q3_K", "IQ3_XXS", "Q2_K"):
        shapes, drawn = report["random"][fmt], report["results"][f"{fmt}+imatrix"]
        errors = (shapes["student"], drawn["velocity"], drawn["right"] / drawn["of"])
        shown = (f"{100 * error:.3g} %" for error in errors)
        rows.append([fmt, f"{bits(fmt):.4g}", f"{shapes['bytes'] / 1e9:.2f} GB", *shown])
    return markdown("type | bits | 6B file | weights | velocity | right", rows)


def errors(rows: Rows) -> str:
    """A row a type: error of each kind of weights and the ratio to ggml's, without and with importance."""
    found = {(r["format"], r["weights"], r["importance"]): r for r in rows}
    shown = (
        [name, *(_error(found[name, kind, costs], "") for costs in (False, True) for kind in KINDS)]
        for name in dict.fromkeys(row["format"] for row in rows)
    )
    return markdown(
        "type | Gaussian | Student-t | SmolLM2 | Gaussian, importance | Student-t, importance "
        "| SmolLM2, importance", shown,
    )  # fmt: skip


def ones(rows: Rows) -> str:
    """What the search gives the types that are ggml's bytes without importance."""
    found = {(r["format"], r["weights"]): r for r in rows if r.get("ours_ones") is not None}
    shown = (
        [name, *(_error(found[name, kind], "_ones") for kind in KINDS)]
        for name in dict.fromkeys(name for name, _ in found)
    )
    return markdown("type, matrix of ones | Gaussian | Student-t | SmolLM2", shown)


def _error(row: Mapping[str, Any], suffix: str) -> str:
    ratio = row[f"ratio{suffix}"]
    return f"{row[f'ours{suffix}']:.4f} ({'-' if ratio is None else f'{ratio:.3f}'})"


def speed(rows: Rows) -> str:
    """A row a type: MB/s of wall time on all threads, and ggml's on its one."""
    most = max(row["threads"] for row in rows)
    rates: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        key = (row["format"], row["importance"], row["by"], row["threads"])
        rates.setdefault(key, {})[row["rows"]] = row["wall"]["median"]
    columns = [
        (costs, by, threads)
        for costs in (False, True)
        for by, threads in (("ours", most), ("ours", 1), ("ggml", 1))
    ]
    names = {row["format"] for row in rows}
    shown = (
        [name, *(_rate(rates.get((name, *column), {})) for column in columns)]
        for name in ENCODERS
        if name in names
    )
    return markdown(
        f"type | ours, {most} threads | ours, one | ggml, one | ours, {most} threads, importance "
        "| ours, one | ggml, one", shown,
    )  # fmt: skip


def _rate(by_rows: Mapping[int, float]) -> str:
    if not by_rows:
        return "-"
    value = by_rows.get(SPEED_ROWS, by_rows[min(by_rows)])
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def recipes(report: Mapping[str, Any]) -> str:
    """A row for each size and way to choose types."""
    rows = (
        (
            mix, how, f"{row['bytes'] / 1e6:.2f} MB", f"{100 * row['velocity']:.2f} %",
            f"{row['psnr']:.1f}", f"{row['ssim']:.4f}", f"{row['right']} of {row['of']}",
        )
        for mix, size in report["sizes"].items()
        for how, row in size["choices"].items()
    )  # fmt: skip
    return markdown("size of | types by | file | velocity | PSNR, dB | SSIM | right", rows)


def counts(rows: Sequence[Mapping[str, str]]) -> str:
    """Instructions a weight of the kernels, and the registers and shared memory of the fused one."""

    def of(kernel: str, target: str, **where: str) -> list[Mapping[str, str]]:
        where |= {"kernel": kernel, "target": target}
        return [row for row in rows if all(row[key] == value for key, value in where.items())]

    targets = sorted({row["target"] for row in rows})
    failures = sum(bool(row["failure"]) for row in rows)
    spills = sum(row["spills"] != "0" or row["stack"] != "0" for row in rows)
    lines = []
    for name in dict.fromkeys(row["format"] for row in rows if row["kernel"] == "dequantize"):
        where = {"format": name, "dtype": "bfloat16"}
        dense = [of("dequantize", target, **where)[0] for target in ("sm_89", "sm_90")]
        cells = [f"{int(row['instructions']) / 16:.1f}" for row in dense]
        for target, tile in (("sm_89", "32x64"), ("sm_90", "32x64"), ("sm_90", "128x")):
            fused = [r["per_weight"] for r in of("matmul", target, **where) if r["tile"].startswith(tile)]
            cells.append(f"{float(fused[0]):.1f}" if fused else "")
        lines.append([name, *cells])
    worst = [
        [target, max(int(r["registers"]) for r in fused), f"{max(int(r['shared']) for r in fused) >> 10} KiB"]
        for target in targets
        if (fused := of("matmul", target))
    ]
    return "\n\n".join(
        [
            f"{len(rows):,} cells (kernel, format, dtype, tile, target) with Triton {rows[0]['triton']}: "
            f"{failures} failures, {spills} with spills or stack; targets {', '.join(targets)}.",
            "Instructions of a thread for each weight: all of the dequantising kernel, the loop of the fused "
            "one (tiles of 32 rows, and of 128).",
            markdown(
                "format | dequantise sm_89 | sm_90 | fused 32, sm_89 | fused 32, sm_90 | fused 128, sm_90",
                lines,
            ),
            markdown("fused kernel, worst cell | registers | shared memory", worst),
        ]
    )


def steps(report: Mapping[str, Any]) -> str:
    """A row a GPU and size: the modelled milliseconds of a step by part."""
    lines = []
    for gpu, sizes in report["step_ms"].items():
        for pixels, cost in sizes.items():
            formats, backends = list(cost["dequantise"]), list(cost["attention"])
            ranges = [
                cost["linears"],
                *(cost["attention"][name] for name in backends),
                *(cost["dequantise"][name] for name in formats),
                cost["elementwise"],
                cost["gaps"],
                *(cost["replayed"][name] for name in formats),
                cost["host"],
            ]
            shown = (text(Range(*each)) for each in ranges)
            lines.append([f"{gpu}, {pixels} px", f"{cost['floor']:.0f}", *shown])
    head = ["GPU, image", "floor", "products", *(f"attention, {name}" for name in backends)]
    head += [*(f"dequantise {name}" for name in formats), "element-wise", "gaps"]
    head += [*(f"whole, {name}" for name in formats), "host, launch by launch"]
    return markdown(" | ".join(head), lines)


def compute_tables(report: Mapping[str, Any]) -> dict[str, str]:
    """Compute modes on the embedded model, each kind of layer alone in int8, and products with outliers."""
    modes = []
    for name, row in report["modes"].items():
        mix, _, mode = name.partition(" ")
        equal = "psnr" not in row
        modes.append(
            [
                mix,
                mode,
                "0" if equal else f"{100 * row['velocity']:.3g} %",
                f"{100 * row['source']:.3g} %",
                "equal" if equal else f"{row['psnr_mean']:.1f}",
                "1" if equal else f"{row['ssim']:.4f}",
                f"{row['right']} of {row['of']}",
            ]
        )
    layers = [
        [network, kind, f"{row['layers']:.0f}", *(f"{100 * row[how]:.3g} %" for how in HOW)]
        for network, kinds in report["layers"].items()
        for kind, row in kinds.items()
    ]
    outliers = report["products"]
    products = [
        [kind, *(f"{100 * of[kind]['3840'][how]:.2f} %" for of in outliers.values() for how in HOW)]
        for kind in next(iter(outliers.values()))
    ]
    return {
        "modes": markdown(
            "file | compute | velocity, to exact | to the source | PSNR to exact, dB | SSIM | right", modes
        ),
        "layers": markdown("error of | layers in int8 | number | plain | rotated", layers),
        "outliers": markdown(
            " | ".join(["activations", *(f"weights {name}, {how}" for name in outliers for how in HOW)]),
            products,
        ),
    }


GAIN_SUBJECTS = ("velocity", "velocity, importance", "caption", "caption, normed", "SmolLM2, a fifth")
"""What the errors of benchmarks.gain are of, as columns."""


def gain(report: Mapping[str, Any]) -> str:
    """A row a type: its gain, and errors as the encoder leaves the weights / with each block's gain as 1."""
    rows = []
    for fmt, found in sorted(report["results"].items(), key=lambda item: (-bits(item[0]), item[0])):
        cells = (
            f"{100 * found[name]['as found']:.3g} / {100 * found[name]['block']:.3g} %"
            if name in found
            else ""
            for name in GAIN_SUBJECTS
        )
        rows.append([fmt, f"{found['velocity']['gain']:.3f}", *cells])
    return markdown(" | ".join(["type", "gain", *GAIN_SUBJECTS]), rows)


def int8_steps(report: Mapping[str, Any]) -> str:
    """A row a card and size: the modelled step in 16 bits and in int8, and an image of eight steps."""
    lines = []
    for card, sizes in report["int8_ms"].items():
        for pixels, cost in sizes.items():
            ranges = [Range(*cost[name]) for name in ("16 bits", "packed", "kept")]
            parts = [Range(*cost[name]) for name in ("linears", "attention", "quantise", "elementwise")]
            images = [text(each.times(8e-3)) for each in ranges]
            gain = ranges[0].middle / ranges[1].middle
            lines.append(
                [f"{card}, {pixels} px", *map(text, ranges), f"{gain:.1f}", *map(text, parts), *images]
            )
    head = (
        "card, image | 16 bits, Q4_K | int8 from Q4_K | int8 rows kept | times as fast | products | attention"
    )
    head += " | quantise weights | element-wise | 8 steps, s: 16 bits | int8 from Q4_K | int8 rows kept"
    return markdown(head, lines)


def int8_attention(report: Mapping[str, Any]) -> str:
    """Attention of a step in int8: milliseconds in 16 bits and with q k^T in int8, what that saves."""
    cards = report["int8_ms"]
    lines = [
        [
            card,
            *(
                cell
                for cost in sizes.values()
                for cell in (
                    *(text(Range(*cost[f"attention_{name}"])) for name in ("16", "int8")),
                    *(f"{round(100 * cost[f'attention_{name}'])} %" for name in ("share", "gain")),
                )
            ),
        ]
        for card, sizes in cards.items()
    ]
    columns = [
        f"{pixels} px: {name}"
        for pixels in next(iter(cards.values()))
        for name in ("16 bits, ms", "int8, ms", "share of a step", "saved of it")
    ]
    return markdown(" | ".join(["card", *columns]), lines)


def attention_counts(rows: Sequence[Mapping[str, str]]) -> str:
    """What attention with q k^T in int8 was compiled to, for heads of 128 channels in bfloat16."""
    lines = [
        [row["target"], row["tile"], row["loop"], row["registers"], f"{int(row['shared']) / 1024:.0f} KiB"]
        for row in rows
        if row["kernel"] == "attend" and row["tile"].startswith("128 ") and row["dtype"] == "bfloat16"
    ]
    return markdown("target | channels, tile | loop | registers | shared memory", lines)


def int8_counts(rows: Sequence[Mapping[str, str]]) -> str:
    """What the product of int8 was compiled to, the largest tile of each target."""
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        found = [
            row
            for row in rows
            if (row["kernel"], row["target"]) == ("int8_matmul", target) and not row["tile"].endswith("odd")
        ]
        if found:
            most = max(
                found, key=lambda row: math.prod(int(n) for n in row["tile"].split()[0].split("x")[:2])
            )
            shared = f"{int(most['shared']) >> 10} KiB"
            lines.append([target, most["tile"], most["tensor_core"], most["loop"], most["registers"], shared])
    return markdown("target | tile | int8 instructions | loop | registers | shared memory", lines)


def _kernels() -> dict[str, str]:
    report, rows = read("model.json"), compiled_rows()
    return {
        "counts": counts(rows),
        "steps": steps(report),
        "int8": int8_steps(report),
        "int8 attention": int8_attention(report),
        "int8 counts": int8_counts(rows),
        "int8 attention counts": attention_counts(rows),
    }


def cpu_products(report: Mapping[str, Any]) -> str:
    """A row a way to multiply: GFLOP/s of the seven products of a block, and how often exact's."""
    by_tokens = sorted(report["products"].values(), key=lambda found: found["m"])
    rows = [
        [
            name,
            *(
                f"{found['variants'][name]['gflops']:.0f} ({found['variants'][name]['over exact']:.2f})"
                for found in by_tokens
            ),
            f"{100 * by_tokens[-1]['variants'][name]['error']:.2g} %",
        ]
        for name in by_tokens[0]["variants"]
    ]
    head = ["GFLOP/s (times exact)", *(f"M = {found['m']:,}" for found in by_tokens), "error"]
    return markdown(" | ".join(head), rows)


def _quality() -> dict[str, str]:
    report = read("quality.json")
    return {
        "nano": nano(report),
        "full": full(report),
        "gain": gain(read("gain.json")),
        **compute_tables(read("compute_modes.json")),
    }


def _encoders() -> dict[str, str]:
    measured = read("quantize_errors.json")["errors"]
    return {
        "errors": errors(measured),
        "ones": ones(measured),
        "speed": speed(read("quantize_speed.json")["speed"]),
    }


def _recipes() -> dict[str, str]:
    return {"choice": choice(read("quality.json")), "recipes": recipes(read("recipe_search.json"))}


def _sampling() -> dict[str, str]:
    from benchmarks import samplers

    return samplers.tables(read("samplers.json"))


PAGES: dict[Path, Callable[[], dict[str, str]]] = {
    ROOT / "docs/explanation/kernels.md": _kernels,
    ROOT / "docs/benchmarks/index.md": overview.tables,
    ROOT / "docs/benchmarks/quality.md": _quality,
    ROOT / "docs/explanation/encoders.md": _encoders,
    ROOT / "docs/guides/batch.md": lambda: batch.tables(read("batch.json")),
    ROOT / "docs/guides/recipes.md": _recipes,
    ROOT / "docs/guides/sampling.md": _sampling,
    ROOT / "docs/explanation/decoding.md": lambda: decoding.tables(read("decoding_cpu.json")),
    ROOT / "docs/guides/parallel.md": lambda: {
        "ulysses": ulysses.table(read("ulysses.json")),
        "ulysses model": ulysses_model.table(read("ulysses_model.json")),
    },
    ROOT / "benchmarks/README.md": lambda: {
        "standing": standing.table(standing.load()),
        "cpu": cpu_products(read("cpu_products.json")),
    },
}
"""The tables of each page, by the name between the markers."""


def main() -> None:
    """Fill all pages."""
    for page, made in PAGES.items():
        fill_tables(page, made())


if __name__ == "__main__":
    main()
