"""The standing list for a GPU, in order of importance, in parts that each write their results.

    python -m benchmarks.gpu [--part 1 2 ...] [--out FOLDER] [--compile]     all parts: under nine minutes
    python -m benchmarks.gpu --rehearse      tiny shapes, any device; without a GPU in Triton's interpreter
    python -m benchmarks.gpu --rehearse --no-check     the same on a stand-in for a GPU that computes nothing
    python -m benchmarks.gpu --update-readme [--from results/gpu_part*.csv]  into standing.json and README.md

A part begins no further case once its seconds are used up; its rows so far are on the disk. The figures of
the standing list are printed at the end. `--update-readme --from` needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import run, standing
from benchmarks.report import RESULTS
from benchmarks.timing import Ceilings
from benchmarks.variants import short
from zimage_core.config import TransformerConfig


@dataclass(frozen=True)
class Part:
    """Cases that belong together.

    Args:
        text: What is measured.
        seconds: After which no further case is begun.
        work: Kinds of cases with their arguments.
    """

    text: str
    seconds: float
    work: tuple[tuple[str, tuple[str, ...]], ...]


_M = tuple(str(m) for m in (standing.FEW, standing.MANY))
_BETWEEN = ("256", "512", "384", "128", "768", "1056", "64", "16", "2048", "1")
PARTS = {
    1: Part(
        "dequantising in the main formats, the fused product for few and for many rows",
        90,
        (("dequant", ("--format", *standing.MAIN)), ("matmul", ("--m", *_M))),
    ),
    2: Part(
        "a block, a step and its parts at full size, a step at 512 px",
        165,
        (
            ("block", ()),
            ("step", ("--repeats", "7")),
            ("parts", ("--repeats", "7")),
            ("step", ("--pixels", str(standing.SMALL), "--repeats", "7")),
        ),
    ),
    3: Part("element-wise steps and attention", 60, (("elementwise", ()), ("attention", ()))),
    4: Part("where fused and dequantised products cross", 80, (("matmul", ("--m", *_BETWEEN)),)),
    5: Part("dequantising in every format", 110, (("dequant", ("--format", "all")),)),
}
TINY = ("--shape", "200x512", "--pixels", "64", "--repeats", "2", "--seconds", "0", "--most", "2")
TINY_CONFIG = TransformerConfig(
    dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=256, hidden_dim=512
)


def run_part(
    number: int, given: argparse.Namespace, measured: Ceilings | None
) -> tuple[list[dict[str, Any]], Ceilings]:
    """Measure one part; its rows and the ceilings, which the next part takes over."""
    part = PARTS[number]
    print(f"part {number}: {part.text}, {part.seconds:.0f} s", flush=True)
    deadline = math.inf if given.rehearse else time.monotonic() + part.seconds
    common = ["--repeats", "12", "--seconds", "0.25", "--most", "10"]
    common += ["--out", str(given.out)] if given.out else []
    common += ["--device", given.device] if given.device else []
    common += ["--compile"] if given.compile else []
    common += [] if given.check else ["--no-check"]
    common += ["--interpret"] if given.rehearse and not torch.cuda.is_available() else []
    bench = None
    for what, extra in part.work:
        words = [*common, *extra, *(TINY if given.rehearse else ())]
        if given.rehearse and "--m" in words:
            words += ["--m", "5"]
        namespace = run.parser().parse_args(words)
        if bench is None:
            namespace.out = given.out
            bench = run.prepare(f"gpu_part{number}", namespace, measured)
            bench.deadline = deadline
        bench.given = namespace
        bench.budget = dataclasses.replace(bench.budget, repeats=namespace.repeats)
        run.run(what, bench, TINY_CONFIG if given.rehearse else None)
    assert bench is not None
    return bench.results.rows, bench.ceilings


def run_parts(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all parts that were asked for.

    Raises:
        SystemExit: The device failed, after which only another process can use it.
    """
    rows: list[dict[str, Any]] = []
    measured = None
    for i, number in enumerate(given.part):
        try:
            found, measured = run_part(number, given, measured)
        except Exception as error:  # a case that fails is a row; what arrives here is the device's
            left = " ".join(map(str, given.part[i + 1 :]))
            more = f"; go on with --part {left}, then --update-readme --from FILES" if left else ""
            raise SystemExit(
                f"part {number} ended early, rows so far are written: {short(error)}{more}"
            ) from error
        rows += found
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line asks for, or read it; all rows come back."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="*", type=int, choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", help="default cuda")
    parser.add_argument("--compile", action="store_true", help="the plain variants compiled too; slow")
    parser.add_argument("--out", type=Path, help="folder of the results; default results/")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, nothing is taken over")
    parser.add_argument("--no-check", dest="check", action="store_false", help="of a rehearsal's results")
    parser.add_argument("--update-readme", action="store_true")
    parser.add_argument("--from", dest="files", nargs="*", type=Path, help="result files in place of a run")
    given = parser.parse_args(argv)
    if not given.check and not given.rehearse:
        parser.error("--no-check belongs to --rehearse: what is measured has to be checked")
    if given.files:
        rows, gpu, date = standing.from_files(given.files)
    else:
        if not torch.cuda.is_available() and not given.rehearse:
            raise SystemExit("there is no GPU here: use --rehearse, or --update-readme --from FILES")
        given.out = given.out or (None if given.rehearse else RESULTS)
        rows = run_parts(given)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        date = time.strftime("%Y-%m-%d")
    values = standing.evaluate(rows)
    for figure in standing.updated(standing.load(), values, gpu, date):
        if figure["id"] in values:
            print(f"{figure['text']:75} aim: {standing.aim(figure):16} {standing.measured(figure)}")
            print(f"{'':75} predicted: {standing.predicted(figure)}")
    if given.update_readme and not given.rehearse:
        standing.update(rows, gpu, date)
    return rows


if __name__ == "__main__":
    main()
