"""Time kernels, blocks, steps and images, beside what others do with the same bytes in the same run.

    python -m benchmarks.run {dequant,matmul,elementwise,attention,block,step,parts,vae,image,all}
        [--format Q4_K Q6_K | all] [--m 32 4128] [--shape w13 3840x3840 | all] [--device cuda]
        [--dtype bfloat16] [--repeats 20] [--seconds 0.4] [--compile] [--baseline resident] [--out FOLDER]

Every variant is checked against the reference dequantiser and float64 before anything is timed; a wrong
one is refused and the table says so. Only --no-check leaves that out, for a device that computes nothing.
Variants run in turn inside each repeat. `of_ceiling` compares with a large copy and a large product measured
at the start. Writes results/WHAT_DEVICE_DATE.csv, or the CSV that --out names, and a JSON with the
environment after every case; `python -m benchmarks.plots` draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.records import Results
from benchmarks.report import RESULTS
from benchmarks.timing import Budget, Ceilings, ceilings, name_of, warm_up
from benchmarks.variants import Bench, short
from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.nn.attention import settings

WHAT = ("dequant", "matmul", "elementwise", "attention", "block", "step", "parts", "vae", "image")
STEP = ("matmul", "attention", "block", "step", "parts")
"""Kinds that are computed with torch's settings of a denoising step."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROWS_GPU = (1, 8, 16, 32, 64, 128, 288, 512, 1056, 2048, 4128)
ROWS_CPU = (32, 288)


def parser() -> argparse.ArgumentParser:
    """Arguments that all tools share."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--format", nargs="*", metavar="NAME", help='formats, or "all" block formats; default Q4_K')
    add("--m", nargs="*", type=int, metavar="ROWS", help="rows of x")
    add("--shape", nargs="*", metavar="NAME|NxK", help='matrices, or "all"; default w13')
    add("--pixels", type=int, default=cases.PIXELS, help="side of the image of a step or a decode")
    add("--caption", type=int, default=cases.CAPTION, help="tokens of the caption of a step")
    add("--layers", type=int, help="main blocks of a step; default all, on a CPU 2")
    add("--device", help="cuda or cpu; default a GPU if there is one")
    add("--dtype", choices=DTYPES, help="default bfloat16, on a CPU float32")
    add("--repeats", type=int, help="default 20, on a CPU 7")
    add("--seconds", type=float, help="least seconds of a case; default 0.4, on a CPU 1")
    add("--most", type=float, default=60.0, help="seconds after which a case with three repeats ends")
    add("--cpu-time", action="store_true", help="on a CPU: seconds of the process, for a busy machine")
    add("--threads", type=int, help="of a CPU; default torch's own, with --cpu-time one")
    add("--baseline", default="", help="variant that ratios are taken to")
    add("--compile", action="store_true", help="the plain variants under torch.compile too")
    add("--no-graphs", dest="graphs", action="store_false", help="time eager calls, launch gaps included")
    add("--replay", nargs="*", default=["packed"], help="models whose step is also replayed from a graph")
    add("--interpret", action="store_true", help="on a CPU: check the kernels in Triton's interpreter")
    add(
        "--no-check", dest="check", action="store_false",
        help="time without comparing results; standing figures are never taken from such a run",
    )  # fmt: skip
    add("--transformer", type=Path, help="files of `image`, all three or none")
    add("--text-encoder", type=Path)
    add("--vae", type=Path)
    add("--image-pixels", type=int, help="side of the image of `image`; default the model's")
    add("--image-steps", type=int)
    add("--image-repeats", type=int, default=3)
    add("--out", type=Path, default=RESULTS, help="folder of the results, or the CSV file itself")
    return found


def prepare(what: str, given: argparse.Namespace, measured: Ceilings | None = None) -> Bench:
    """Device, dtype, ceilings and the file of results."""
    if given.interpret:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    gpu = device.type == "cuda"
    if not gpu and (given.threads or given.cpu_time):
        torch.set_num_threads(given.threads or 1)
    dtype = DTYPES[given.dtype or ("bfloat16" if gpu else "float32")]
    torch.manual_seed(0)
    seconds = (0.4 if gpu else 1.0) if given.seconds is None else given.seconds
    budget = Budget(given.repeats or (20 if gpu else 7), seconds, given.most, given.cpu_time)
    found = measured or ceilings(device, dtype, given.cpu_time)
    about = {
        "arguments": {k: v for k, v in vars(given).items() if not isinstance(v, Path) and v is not None},
        "ceilings": {
            "copy_gbps": round(found.copy / 1e9, 1),
            "matmul_tflops": {k: round(v / 1e12, 2) for k, v in found.matmul.items()},
        },
        "budget": dataclasses.asdict(budget),
    }
    results = Results(what, device, given.out, about)
    bench = Bench(device, dtype, budget, found, results, given)
    head = {"what": "ceiling", "dtype": name_of(dtype), "variant": "torch"}
    copy, product = found.copy / 1e9, found.matmul.get(name_of(dtype), 0.0) / 1e12
    results.add(
        [
            head | {"case": "copy", "gbps": copy, "note": f"{copy:.0f} GB/s"},
            head | {"case": "matmul", "tflops": product, "note": f"{product:.2f} TFLOP/s"},
        ]
    )
    warm_up(device)
    return bench


def chosen_shapes(given: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """(N, K) by name for what --shape says."""
    known = cases.shapes()
    if given.shape == ["all"]:
        return known
    found = {}
    for name in given.shape or [next(iter(known))]:
        if name in known:
            found[name] = known[name]
            continue
        try:
            n, k = (int(side) for side in name.split("x"))
        except ValueError:
            raise SystemExit(f"--shape {name}: wanted NxK or one of {', '.join(known)}") from None
        found[name] = (n, k)
    return found


def run(
    what: str,
    bench: Bench,
    config: TransformerConfig | None = None,
    vae: AutoencoderConfig | None = None,
) -> None:
    """All cases of one kind that the arguments ask for; stops at the deadline.

    Args:
        what: One of `WHAT`.
        bench: The run.
        config: Of the transformer; by default the full size, with two main blocks on a CPU.
        vae: Configuration of the VAE; by default the full size.
    """
    from benchmarks import kernel_cases, model_cases, part_cases, step_cases

    given = bench.given
    layers = given.layers or (cases.TRANSFORMER.n_layers if bench.gpu else 2)
    config = config or dataclasses.replace(cases.TRANSFORMER, n_layers=layers)
    found = kernel_cases.formats(given.format)
    fits = [
        (fmt, n, k, name)
        for name, (n, k) in chosen_shapes(given).items()
        for fmt in found
        if k % fmt.weights == 0
    ]
    rows = given.m or (ROWS_GPU if bench.gpu else ROWS_CPU)
    joint = given.m or [cases.stages(given.pixels, given.caption, config)[0][1]]
    size = (given.pixels, given.caption, config)
    if what == "dequant":
        work = [(kernel_cases.dequant, each) for each in fits]
    elif what == "matmul":
        work = [(kernel_cases.matmul, (fmt, n, k, m, name)) for fmt, n, k, name in fits for m in rows]
    elif what == "elementwise":
        work = [(step_cases.elementwise, (case,)) for m in joint for case in cases.elementwise(m, config)]
    elif what == "attention":
        work = [(step_cases.attend, (case,)) for case in cases.attention(*size)]
    elif what == "block":
        work = [(model_cases.block, (fmt, m, config)) for fmt in found for m in joint]
    elif what == "step":
        work = [(model_cases.step, (fmt, *size)) for fmt in found]
    elif what == "parts":
        work = [(part_cases.parts, (fmt, *size)) for fmt in found]
    elif what == "vae":
        work = [(model_cases.vae, (given.pixels, vae or AutoencoderConfig()))]
    else:
        files = (given.transformer, given.text_encoder, given.vae)
        if any(files) and not all(files):
            raise SystemExit("image needs --transformer, --text-encoder and --vae, or none of them")
        wanted = files if all(files) else None
        work = [(model_cases.image, (wanted, given.image_pixels, given.image_steps))]
    for case, arguments in work:
        if bench.deadline_passed:
            print(f"{what}: out of time, {len(work)} cases planned", flush=True)
            return
        try:
            with settings(bench.device, "transformer", bench.dtype) if what in STEP else nullcontext():
                case(bench, *arguments)
        except Exception as error:  # noqa: BLE001 - out of memory while setting up, say: the others go on
            shown = [each for each in arguments if not isinstance(each, TransformerConfig)]
            about = " ".join(str(getattr(each, "name", each)) for each in shown)
            note = f"failed: {short(error)}"
            bench.results.add([{"what": what, "case": about, "variant": "all", "note": note}])
        if bench.gpu:
            torch.cuda.empty_cache()


def main(
    argv: Sequence[str] | None = None,
    config: TransformerConfig | None = None,
    vae: AutoencoderConfig | None = None,
) -> Bench:
    """Run from the command line; the bench with its rows comes back."""
    arguments = parser()
    arguments.prog = "python -m benchmarks.run"
    arguments.add_argument("what", choices=(*WHAT, "all"))
    given = arguments.parse_args(argv)
    bench = prepare(given.what, given)
    for what in WHAT if given.what == "all" else (given.what,):
        run(what, bench, config, vae)
    if bench.results.path is not None:
        print(f"written to {bench.results.path.name}", flush=True)
    return bench


if __name__ == "__main__":
    main()
