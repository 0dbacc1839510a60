"""The tables of docs/benchmarks/index.md, from the committed results.

`python -m benchmarks.tables` fills the page.

The page is a summary. Each table names the machine of its figures, and each row the file that has them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import decoding
from benchmarks.report import RESULTS, ROOT, markdown, read

STEP = "step_cpu_avx2_threads_2_2026-11-24"
VAE = "vae_cpu_avx2_threads_2_2026-11-24"
TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ2_XXS")
"""Types in the short table of quality."""
PRODUCTS = (
    "exact", "int8 kept", "diffusers' GGUF path", "ggml", "OpenVINO int8, a scale a token"
)  # fmt: skip
"""Ways to multiply in the short table of products."""
WHOLE = {
    "full_size_cpu_exact.json": "exact",
    "full_size_cpu_auto.json": "auto: int8, text exact",
    "full_size_cpu_int8_512.json": "int8, text too",
}
"""Runs of the 6B model on one machine: file -> its name in the table."""


def tables() -> dict[str, str]:
    """All tables of the page."""
    return {
        "others": others(),
        "products": products(),
        "whole": whole(),
        "quality": quality(),
        "memory": memory(),
        "parity": parity(),
    }


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a CSV of results."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cpu(machine: Mapping[str, Any]) -> str:
    """A CPU in a few words: AVX2, or AVX512 with what it has beside, and the threads."""
    names = {"avx512_vnni": "VNNI", "avx512_bf16": "BF16"}
    beside = [names[name] for name in machine["features"] if name in names]
    threads = machine["threads"]
    return f"{' '.join([machine['cpu'], *beside])}, {threads} thread{'s' if threads > 1 else ''}"


def link(name: str) -> str:
    """A file of results as a link from the page."""
    return f"[{name.rpartition('.')[2]}](../../benchmarks/results/{name})"


def others() -> str:
    """Beside other programs, on the same work and machine."""
    return markdown("what | times as fast as | the other | CPU | raw data", [*steps(), *vae(), *tokens()])


def steps() -> Iterator[list[str]]:
    """Steps of full-width layers beside diffusers' GGUF path."""
    where = cpu(json.loads((RESULTS / f"{STEP}.json").read_text("utf-8"))["machine"])
    for row in rows_of(STEP):
        if row["variant"] == "diffusers":
            what = f"a step of {row['case'].rpartition(',')[0]} with {row['format']}, exact"
            yield [what, f"{float(row['ratio']):.2f}", "diffusers' GGUF path", where, link(f"{STEP}.csv")]


def vae() -> Iterator[list[str]]:
    """Decoding beside diffusers."""
    where = cpu(json.loads((RESULTS / f"{VAE}.json").read_text("utf-8"))["machine"])
    for row in rows_of(VAE):
        if row["variant"] == "whole" and row["baseline"] == "diffusers":
            ratio = 1 / float(row["ratio"])
            yield [f"VAE decode, {row['case']}", f"{ratio:.2f}", "diffusers", where, link(f"{VAE}.csv")]


def tokens() -> Iterator[list[str]]:
    """Single tokens of a language model beside llama.cpp."""
    report = read("decoding_cpu.json")
    for threads in (1, 2):
        where = cpu({**report["machine"], "threads": threads})
        few, more = (
            report["files"][f"qwen3_4b_{layers}_layers_q4_k_m.gguf"][f"{threads} threads"]
            for layers in decoding.WIDE
        )
        found = decoding._whole(few, more)["auto"]
        what = f"Qwen3-4B writes, Q4_K_M, auto ({found['tokens/s']:.1f} tokens/s, from 2 and 6 layers)"
        yield [what, f"{found['times llama.cpp']:.2f}", "llama.cpp", where, link("decoding_cpu.json")]


def products() -> str:
    """GFLOP/s of the products of a block."""
    report = read("cpu_products.json")
    found = sorted((each for each in report["products"].values() if each["m"] > 32), key=lambda e: e["m"])
    rows = [
        [name, *(f"{each['variants'][name]['gflops']:.0f}" for each in found),
         f"{100 * found[-1]['variants'][name]['error']:.2g} %"]
        for name in PRODUCTS
    ]  # fmt: skip
    sizes = {288: "256 px", 1056: "512 px"}
    return markdown(
        " | ".join(["GFLOP/s", *(f"{each['m']:,} tokens ({sizes[each['m']]})" for each in found), "error"]),
        rows,
    )


def whole() -> str:
    """The 6B model end to end on a CPU."""
    rows = []
    for file, name in WHOLE.items():
        report = read(file)
        seconds = report["seconds"]
        step = sum(seconds["steps"][1:]) / len(seconds["steps"][1:])
        rows.append(
            [name, f"{report['size']} px", f"{seconds['steps'][0]:.0f} s", f"{step:.1f} s",
             f"{seconds['encode']:.1f} s", f"{seconds['decode']:.1f} s",
             f"{report['bytes']['anonymous_peak'] / 1e9:.1f} GB", link(file)]
        )  # fmt: skip
    return markdown(
        "compute | image | first step | later steps | text | decode | beside the mapped files | raw data",
        rows,
    )


def quality() -> str:
    """What some types cost; docs/benchmarks/quality.md has all."""
    report = read("quality.json")
    rows = []
    for fmt in TYPES:
        found = report["results"][fmt]
        size = f"{report['random'][fmt]['bytes'] / 1e9:.2f} GB"
        psnr = "equal" if found["psnr"] is None else f"{found['psnr']:.1f}"
        velocity = f"{100 * found['velocity']:.2g} %"
        rows.append([fmt, size, velocity, psnr, f"{found['right']} of {found['of']}"])
    return markdown("type | 6B transformer | error of the velocity | PSNR, dB | images right", rows)


def memory() -> str:
    """What was planned for a GPU, and what a simulated driver gave."""
    rows = [
        [row["mix"], row["vram"], *(f"{row[key] / 2**20:,.0f}" for key in ("budget", "planned", "given"))]
        for row in json.loads((ROOT / "tests/host_gpu/budgets.json").read_text("utf-8"))
        if row["mix"] == "Q4_K_M"
    ]
    return markdown("file | `--vram` | limit, MiB | planned | given by the driver", rows)


def parity() -> str:
    """The largest difference from diffusers and transformers for each component."""
    differences = read("parity.json")["differences"]
    rows = []
    for component in dict.fromkeys(row["component"] for row in differences):
        mine = [row for row in differences if row["component"] == component]
        worst = (max(row[key] or 0 for row in mine) for key in ("float64", "float32", "theirs"))
        rows.append([component, len(mine), *(f"{value:.1e}" for value in worst)])
    return markdown(
        "component | places compared | in float64 | in float32 | what float32 alone moves theirs", rows
    )
