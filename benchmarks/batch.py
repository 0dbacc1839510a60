"""Images an hour of `zimage batch`: one process with one and two threads, and Ray with two workers of one.

    python -m benchmarks.batch [--quick] [--minutes 12] [--wide FOLDER]

Two models: the embedded one, and one of the width of Z-Image with six layers, a text encoder of two layers
and a VAE of the real size, all of random weights, which is written into FOLDER if it is not there (2.9 GB;
default: a folder that is removed). Each run is the command itself in a fresh process. Its images are timed
by when their files appeared, so starting is told from drawing: the rate leaves out the first image of each
worker. The ways take turns; ratios are within a turn. It takes no new turn after `--minutes`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import make_full_size
from benchmarks.report import arguments, markdown, write
from benchmarks.timing import spread
from zimage_core.config import TextEncoderConfig, TransformerConfig

ONE, TWO, RAY = "one process, 1 thread", "one process, 2 threads", "Ray, 2 workers of 1 thread"
WAYS = {
    ONE: ["--threads", "1"],
    TWO: ["--threads", "2"],
    RAY: ["--ray", "--workers", "2", "--threads", "1"],
}
WORKERS = {ONE: 1, TWO: 1, RAY: 2}
EMBEDDED = "embedded model, 80 px"
WIDE = "6 layers of width 3840, 128 px"
LAYERS = 6


def write_wide(folder: Path) -> list[str]:
    """The files of the wide model, written where they are missing -> the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.{end}" for name, end in
             (("transformer", "gguf"), ("text_encoder", "gguf"), ("vae", "safetensors"))}  # fmt: skip
    if not files["transformer"].exists():
        make_full_size.write_transformer(files["transformer"], TransformerConfig(n_layers=LAYERS))
    if not files["text_encoder"].exists():
        make_full_size.write_text_encoder(files["text_encoder"], TextEncoderConfig(num_layers=2))
    if not files["vae"].exists():
        make_full_size.write_vae(files["vae"])
    size = ["--width", "128", "--height", "128", "--steps", "1", "--compute", "exact"]
    return [
        *size,
        *(word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))),
    ]


def run(table: Path, out: Path, options: list[str], workers: int) -> dict[str, float]:
    """One run of the command -> seconds to the first image and of all, and images an hour after the start."""
    command = [sys.executable, "-m", "zimage_core", "batch", str(table), str(out), "--quiet", *options]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=hidden)
    ended = time.time()
    written = sorted(path.stat().st_mtime for path in out.glob("*.png"))
    drawing = written[-1] - written[workers - 1]
    return {
        "first": written[0] - began,
        "all": ended - began,
        "images an hour": 3600 * (len(written) - workers) / drawing,
    }


def measure(options: list[str], count: int, turns: int, until: float) -> dict[str, Any]:
    """All ways in turn, until the turns are made or the time is up, but once at least."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.jsonl"
        rows = ({"prompt": "a red circle", "seed": seed} for seed in range(count))
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for turn in range(turns):
            if turn and time.time() > until:
                break
            for way, more in WAYS.items():
                out = Path(folder) / f"{turn} {way}"
                found[way].append(run(table, out, [*options, *more], WORKERS[way]))
                print(f"{way}: {found[way][-1]}", flush=True)
            equal &= _images(Path(folder) / f"{turn} {ONE}") == _images(Path(folder) / f"{turn} {RAY}")
    shown = [word for word in options if "/" not in word]
    return {"images": count, "options": shown, "equal bytes": equal, "runs": found, **_summary(found)}


def _images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def _summary(found: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each way, and of its rate over that of one thread within a turn."""
    summary: dict[str, Any] = {}
    for way, runs in found.items():
        pairs = zip(runs, found[ONE], strict=True)
        ratios = [mine["images an hour"] / one["images an hour"] for mine, one in pairs]
        figures = {name: spread([each[name] for each in runs]) for name in runs[0]}
        summary[way] = {**figures, "times one thread": round(float(np.median(ratios)), 3)}
    return {"summary": summary}


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """A row a model and way."""
    rows = []
    for model, found in report["models"].items():
        for way, figures in found["summary"].items():
            rate, first, all_ = (figures[name]["median"] for name in ("images an hour", "first", "all"))
            equal = {RAY: "yes" if found["equal bytes"] else "no", ONE: ""}.get(way, "not compared")
            rows.append(
                [model, way, f"{rate:,.0f}", f"{figures['times one thread']:.2f}", f"{first:.1f} s",
                 f"{all_:.1f} s for {found['images']}", equal]
            )  # fmt: skip
    head = "model | way | images an hour | times one thread | to the first image | whole run | same bytes"
    return {"batch": markdown(head, rows)}


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = arguments(__doc__, "batch.json")
    parser.add_argument("--quick", action="store_true", help="one turn and few images, to see that it runs")
    parser.add_argument("--minutes", type=float, default=12.0, help="of measuring; default 12")
    parser.add_argument("--wide", type=Path, metavar="FOLDER", help="where the wide model is kept")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    args = parse()
    began = time.time()
    turns = 1 if args.quick else 3
    models: dict[str, Any] = {}
    facts = {"ray": metadata.version("ray"), "load before": [round(load, 2) for load in os.getloadavg()]}
    models[EMBEDDED] = measure([], 10 if args.quick else 40, turns, began + 20 * args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        options = write_wide(args.wide or Path(folder))
        until = began + 40 * args.minutes  # the last turn takes less than a third of the time
        models[WIDE] = measure(options, 4 if args.quick else 6, turns, until)
    write(args.out, {**facts, "models": models})


if __name__ == "__main__":
    main()
