"""What each type costs and gives: files of the embedded model, measured by the images they draw.

    python -m benchmarks.quality [--types Q4_K IQ2_S] [--exam 60 --compared 12 --calibration 48] [--again]

Every encoder, without and with an importance matrix, on all matrices of all blocks that it divides; a file is
written, opened and drawn from like any other. Results go to benchmarks/results/quality.json as they come, and
what is there is not measured again. At the end docs/images/quality.png and the tables in
docs/benchmarks/quality.md are made from it, unless --out is another file.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.nano.check import SEED, exam, read, score
from benchmarks.nano.draw import describe, random_scene
from benchmarks.report import NANO, RESULTS, ROOT, arguments, fill_tables, machine
from benchmarks.tables import full, nano
from zimage_core import ZImagePipeline
from zimage_core.config import TransformerConfig
from zimage_core.export.converting import convert_file
from zimage_core.export.quantizing import quantize_file
from zimage_core.export.recipes import SOURCE, TYPES, Recipe, Rule
from zimage_core.formats import by_name
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import ENCODERS, encode
from zimage_core.quantize.imatrix import Imatrix
from zimage_core.study.collect import collect_imatrix
from zimage_core.study.compare import Reference
from zimage_core.weights.names import checkpoint_shapes, transformer_table
from zimage_core.weights.opened import open_weights

STACKS = ("layers.*", "noise_refiner.*", "context_refiner.*")
PLAIN = ("F32", "F16", "BF16")
SHOWN = 8
"""Images of each type that docs/images/quality.png shows."""
ROWS = 96
"""Random rows of each length in a 6B model's matrices."""


def recipe(name: str) -> Recipe:
    """One type on every matrix of every block, floats elsewhere."""
    return Recipe(name, (*(Rule(pattern, name) for pattern in STACKS), Rule("*", SOURCE)))


def pipeline(transformer: Path) -> ZImagePipeline:
    """The embedded model with another transformer."""
    return ZImagePipeline.from_files(transformer, NANO / "text_encoder.gguf", NANO / "vae.safetensors")


def calibration(count: int) -> list[str]:
    """Prompts of the training set, English and Chinese in turn."""
    rng = np.random.default_rng(7)
    scenes = [random_scene(rng, held_out=False) for _ in range(count)]
    return [describe(scene, rng, chinese=bool(k % 2)) for k, scene in enumerate(scenes)]


def weight_error(file: Path, source: Path, fmt: str) -> float:
    """Relative error of all matrices that the file holds in this format, against the source."""
    far = size = 0.0
    with open_weights(file) as one, open_weights(source) as other:
        for name, info in one.tensors.items():
            if info.format.name == fmt and len(info.shape) == 2:
                wanted = other.tensor(name).dequantize().double()
                far += float((one.tensor(name).dequantize().double() - wanted).square().sum())
                size += float(wanted.square().sum())
    return math.sqrt(far / size) if size else math.nan


def random_error(fmt: str, kind: str) -> float:
    """Relative error on rows as long as a 6B model's; Gaussian, or Student's t with 5 degrees."""
    rng = np.random.default_rng(0)
    far = size = 0.0
    for width in (256, 3840, 10240):
        draw = rng.standard_normal((ROWS, width)) if kind == "gauss" else rng.standard_t(5, (ROWS, width))
        x = torch.from_numpy(draw.astype(np.float32) * 0.02)
        out = QuantTensor(encode(x, fmt), by_name(fmt), tuple(x.shape)).dequantize()
        far += float((out.double() - x.double()).square().sum())
        size += float(x.double().square().sum())
    return math.sqrt(far / size)


def full_bytes(fmt: str) -> int:
    """Bytes of a 6B transformer's tensors under the same recipe, floats as BF16."""
    total, rules = 0, recipe(fmt)
    for name, shape in checkpoint_shapes(transformer_table(TransformerConfig(), "fused")).items():
        chosen = rules.type_of(name, 30)
        kind = "F32" if len(shape) == 1 or "pad_token" in name else "BF16" if chosen == SOURCE else chosen
        total += math.prod(shape[:-1]) * by_name(kind).row_bytes(shape[-1])
    return total


class Judge:
    """The source, its images, and everything that is judged against them.

    Args:
        folder: Where files are written.
        args: The command line: exam, compared, calibration.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.source = folder / "source.gguf"
        convert_file(NANO / "transformer.gguf", self.source, dequantize="f32", overwrite=True)
        pipe = pipeline(self.source)
        self.imatrix = collect_imatrix(pipe, calibration(args.calibration))
        self.scenes, self.prompts = exam(args.exam)
        self.pipe = pipe

    def references(self) -> list[Reference]:
        """One for each compared prompt: every prompt has its own seed, as in the exam."""
        return [
            Reference(self.pipe, [prompt], (SEED + k,), block_steps=0)
            for k, prompt in enumerate(self.prompts[: self.args.compared])
        ]

    def measure(self, fmt: str, imatrix: Imatrix | None, references: list[Reference]) -> dict[str, Any]:
        """Figures of one type on all matrices; keeps a strip of images."""
        found, images = self.judge(recipe(fmt), imatrix, references)
        strip = Image.fromarray(np.concatenate(images[:SHOWN], axis=1))
        strip.save(self.folder / f"{fmt}{'-imatrix' if imatrix else ''}.png")
        weights = weight_error(self.folder / "variant.gguf", self.source, fmt)
        return {"bytes": found.pop("bytes"), "seconds": found.pop("seconds"), "weights": weights, **found}

    def judge(
        self, chosen: Recipe, imatrix: Imatrix | None, references: list[Reference]
    ) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
        """Write the file of a recipe, then draw from it: figures, and the images of the exam."""
        out = self.folder / "variant.gguf"
        began = time.perf_counter()
        made = quantize_file(self.source, out, recipe=chosen, imatrix=imatrix, overwrite=True)
        seconds = time.perf_counter() - began
        pipe = pipeline(out)
        found = [reference.compare(pipe) for reference in references]
        images = [pair.b for each in found for pair in each.images]
        for k in range(len(images), len(self.prompts)):
            images.append(np.asarray(pipe(self.prompts[k], seed=SEED + k).images[0]))
        right = score(self.scenes, [read(image) for image in images])["everything"]
        squares = [pair.mean_square for each in found for pair in each.images]
        mean = sum(squares) / len(squares)
        return {
            "bytes": made.nbytes,
            "seconds": round(seconds, 2),
            "velocity": math.sqrt(sum((each.velocity or 0.0) ** 2 for each in found) / len(found)),
            "psnr": -10 * math.log10(mean) if mean else None,
            "ssim": sum(each.ssim for each in found) / len(found),
            "right": right["right"],
            "of": right["of"],
        }, images


def sheet(strips: Path, results: dict[str, Any]) -> None:
    """Write docs/images/quality.png: a row a type, the largest file first, with importance where there is."""
    names = sorted((n for n, r in results.items() if "bytes" in r), key=lambda n: -results[n]["bytes"])
    best = [n for n in names if n.endswith("+imatrix") or f"{n}+imatrix" not in results]
    rows = [(n, strips / f"{n.replace('+', '-')}.png") for n in best]
    rows = [(n, path) for n, path in rows if path.exists()]
    if not rows:
        return
    first = Image.open(rows[0][1])
    width, height = first.width * 3 // 4, first.height * 3 // 4
    made = Image.new("RGB", (90 + width, (height + 2) * len(rows)), "white")
    pen = ImageDraw.Draw(made)
    for i, (name, path) in enumerate(rows):
        pen.text((2, i * (height + 2) + height // 2 - 6), name.removesuffix("+imatrix"), fill="black")
        small = Image.open(path).resize((width, height), Image.Resampling.LANCZOS)
        made.paste(small, (90, i * (height + 2)))
    made.quantize(128).save(ROOT / "docs/images/quality.png", optimize=True)


def main() -> None:
    """Measure what is missing, then make the sheet and the tables."""
    parser = arguments(__doc__, "quality.json")
    parser.add_argument("--types", nargs="+", default=[name for name in ENCODERS if name in TYPES])
    parser.add_argument("--exam", type=int, default=60)
    parser.add_argument("--compared", type=int, default=12)
    parser.add_argument("--calibration", type=int, default=48)
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--strips", type=Path, help="folder that keeps images between calls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("exam", "compared", "calibration")}
    report: dict[str, Any] = {"results": {}, "random": {}}
    if args.out.exists() and not args.again:
        report = json.loads(args.out.read_text("utf-8"))
        if report["settings"] != settings:
            raise SystemExit(f"{args.out} was made with {report['settings']}; give the same, or --again")
    report |= {"machine": machine(), "settings": settings}
    with tempfile.TemporaryDirectory() as temporary:
        judge = Judge(args.strips or Path(temporary), args)
        references = judge.references()
        for fmt in args.types:
            for name, imatrix in ((fmt, None), (f"{fmt}+imatrix", judge.imatrix)):
                if name in report["results"] or (imatrix and fmt in PLAIN):
                    continue
                report["results"][name] = judge.measure(fmt, imatrix, references)
                print(name, report["results"][name], flush=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            if fmt not in report["random"]:
                kinds = {kind: random_error(fmt, kind) for kind in ("gauss", "student")}
                report["random"][fmt] = {**kinds, "bytes": full_bytes(fmt)}
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for reference in references:
            reference.close()
        if args.out == RESULTS / "quality.json":
            sheet(judge.folder, report["results"])
            fill_tables(ROOT / "docs/benchmarks/quality.md", {"nano": nano(report), "full": full(report)})


if __name__ == "__main__":
    main()
