"""Time kernels, blocks, steps and pictures, beside what others do with the same bytes in the same run.

    python -m benchmarks.run {dequant,matmul,elementwise,attention,block,step,image,all}
        [--format Q4_K Q6_K | all] [--m 32 4128] [--shape w13 3840x3840 | all] [--device cuda]
        [--dtype bfloat16] [--repeats 20] [--seconds 0.4] [--compile] [--baseline resident] [--out FOLDER]

Every contestant is checked against the reference dequantiser and float64 before anything is timed; a wrong
one is refused and the table says so. Contestants run in turn inside each repeat. `of_ceiling` compares with a
large copy and a large product measured at the start. Writes results/WHAT_DEVICE_DATE.csv and a JSON with the
environment after every case; `python -m benchmarks.plots` draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.contest import Bench
from benchmarks.records import RESULTS, Results
from benchmarks.timing import Ceilings, Effort, ceilings, name_of, warm_up
from zimage_core.config import TransformerConfig

WHAT = ("dequant", "matmul", "elementwise", "attention", "block", "step", "image")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROWS_GPU = (1, 8, 16, 32, 64, 128, 288, 512, 1056, 2048, 4128)
ROWS_CPU = (32, 288)


def parser() -> argparse.ArgumentParser:
    """Arguments that all tools share."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--format", nargs="*", metavar="NAME", help='block formats, or "all"; default Q4_K')
    found.add_argument("--m", nargs="*", type=int, metavar="ROWS", help="rows of x")
    found.add_argument("--shape", nargs="*", metavar="NAME|NxK", help='matrices, or "all"; default w13')
    found.add_argument("--pixels", type=int, default=cases.PIXELS, help="side of the picture of a step")
    found.add_argument("--caption", type=int, default=cases.CAPTION, help="tokens of the caption of a step")
    found.add_argument("--layers", type=int, help="main blocks of a step; default all, on a CPU 2")
    found.add_argument("--device", help="cuda or cpu; default a GPU if there is one")
    found.add_argument("--dtype", choices=DTYPES, help="default bfloat16, on a CPU float32")
    found.add_argument("--repeats", type=int, help="default 20, on a CPU 7")
    found.add_argument("--seconds", type=float, help="least seconds of a case; default 0.4, on a CPU 1")
    found.add_argument("--most", type=float, default=60.0, help="seconds after which a case ends anyway")
    found.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU: seconds of the process on one thread, an estimate on a busy machine",
    )
    found.add_argument("--threads", type=int, help="of a CPU; default torch's own")
    found.add_argument("--baseline", default="", help="contestant that ratios are taken to")
    found.add_argument("--compile", action="store_true", help="the plain contestants under torch.compile too")
    found.add_argument(
        "--no-graphs", dest="graphs", action="store_false", help="time eager calls, launch gaps included"
    )
    found.add_argument(
        "--replay", nargs="*", default=["packed"], help="models whose step is also replayed from a graph"
    )
    found.add_argument(
        "--interpret",
        action="store_true",
        help="on a CPU: check the kernels in Triton's interpreter, never timed",
    )
    found.add_argument("--transformer", type=Path, help="files of `image`, all three or none")
    found.add_argument("--text-encoder", type=Path)
    found.add_argument("--vae", type=Path)
    found.add_argument("--image-pixels", type=int, help="side of the picture of `image`; default the model's")
    found.add_argument("--image-steps", type=int)
    found.add_argument("--image-repeats", type=int, default=3)
    found.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
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
    effort = Effort(
        given.repeats or (20 if gpu else 7),
        (0.4 if gpu else 1.0) if given.seconds is None else given.seconds,
        given.most,
        given.cpu_time,
    )
    found = measured or ceilings(device, dtype, given.cpu_time)
    about = {
        "arguments": {
            k: v for k, v in vars(given).items() if not isinstance(v, Path) and k != "out" and v is not None
        },
        "ceilings": {
            "copy_gbps": round(found.copy / 1e9, 1),
            "matmul_tflops": {k: round(v / 1e12, 2) for k, v in found.matmul.items()},
        },
        "effort": dataclasses.asdict(effort),
    }
    results = Results(what, device, given.out, about)
    bench = Bench(device, dtype, effort, found, results, given)
    results.add(_ceiling_rows(found, name_of(dtype)))
    warm_up(device)
    return bench


def _ceiling_rows(found: Ceilings, dtype: str) -> list[dict[str, object]]:
    empty = {"what": "ceiling", "dtype": dtype, "contestant": "torch"}
    rows: list[dict[str, object]] = [empty | {"case": "copy", "note": f"{found.copy / 1e9:.0f} GB/s"}]
    rows[0] |= {"gbps": found.copy / 1e9}
    rate = found.matmul.get(dtype, 0.0) / 1e12
    return [*rows, empty | {"case": "matmul", "tflops": rate, "note": f"{rate:.2f} TFLOP/s"}]


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


def config_of(bench: Bench) -> TransformerConfig:
    """The full-size configuration, with fewer main blocks where asked for or on a CPU."""
    layers = bench.given.layers or (cases.TRANSFORMER.n_layers if bench.gpu else 2)
    return dataclasses.replace(cases.TRANSFORMER, n_layers=layers)


def _is_config(value: object) -> bool:
    return isinstance(value, TransformerConfig)


def run(what: str, bench: Bench, config: TransformerConfig | None = None) -> None:
    """All cases of one kind that the arguments ask for; stops at the deadline."""
    from benchmarks import kernel_cases, model_cases, step_cases

    given = bench.given
    config = config or config_of(bench)
    found = kernel_cases.formats(given.format)
    rows = given.m or (ROWS_GPU if bench.gpu else ROWS_CPU)
    joint = cases.stages(given.pixels, given.caption, config)[0][1]
    work = []
    if what == "dequant":
        for name, (n, k) in chosen_shapes(given).items():
            work += [(kernel_cases.dequant, (fmt, n, k, name)) for fmt in found if k % fmt.weights == 0]
    elif what == "matmul":
        for name, (n, k) in chosen_shapes(given).items():
            fits = [fmt for fmt in found if k % fmt.weights == 0]
            work += [(kernel_cases.matmul, (fmt, n, k, m, name)) for fmt in fits for m in rows]
    elif what == "elementwise":
        for m in given.m or [joint]:
            steps = cases.elementwise(m, given.pixels, given.caption, config)
            work += [(step_cases.elementwise, (case,)) for case in steps]
    elif what == "attention":
        stacks = cases.attention(given.pixels, given.caption, config)
        work += [(step_cases.attend, (case,)) for case in stacks]
    elif what == "block":
        work += [(model_cases.block, (fmt, m, config)) for fmt in found for m in given.m or [joint]]
    elif what == "step":
        work += [(model_cases.step, (fmt, given.pixels, given.caption, config)) for fmt in found]
    else:
        files = (given.transformer, given.text_encoder, given.vae)
        if any(files) and not all(files):
            raise SystemExit("image needs --transformer, --text-encoder and --vae, or none of them")
        wanted = files if all(files) else None
        work.append((model_cases.image, (wanted, given.image_pixels, given.image_steps)))
    for case, arguments in work:
        if kernel_cases.late(bench):
            print(f"{what}: out of time, {len(work)} cases planned", flush=True)
            return
        try:
            case(bench, *arguments)
        except Exception as error:  # noqa: BLE001 - out of memory while setting up, say: the others go on
            about = " ".join(str(getattr(each, "name", each)) for each in arguments if not _is_config(each))
            note = f"failed: {type(error).__name__}: {error}"[:300]
            bench.results.add([{"what": what, "case": about, "contestant": "all", "note": note}])
        if bench.gpu:
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None, config: TransformerConfig | None = None) -> Bench:
    """Run from the command line; the bench with its rows comes back."""
    arguments = parser()
    arguments.prog = "python -m benchmarks.run"
    arguments.add_argument("what", choices=(*WHAT, "all"))
    given = arguments.parse_args(argv)
    bench = prepare(given.what, given)
    for what in WHAT if given.what == "all" else (given.what,):
        run(what, bench, config)
    if bench.results.path is not None:
        print(f"written to {bench.results.path.name}", flush=True)
    return bench


if __name__ == "__main__":
    main()
