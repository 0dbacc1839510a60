"""`zimage imatrix --prompts FILE`: collect an importance matrix while images are drawn."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core.cli.beforehand import check_call
from zimage_core.cli.model_options import (
    add_study,
    call_arguments,
    check_model,
    load_pipeline,
    read_prompts,
)
from zimage_core.cli.progress import Progress
from zimage_core.errors import BadArgument, printable
from zimage_core.files.atomic import check_destination
from zimage_core.files.units import in_bytes

if TYPE_CHECKING:
    from zimage_core.quantize.imatrix import Imatrix
    from zimage_core.study.collect import OnPrompt

FORMATS = ("gguf", "dat")
_OTHER_ENDINGS = (".safetensors", ".sft", ".json", ".npz", ".pt", ".bin", ".txt")
_EPILOG = """\
Without a model the one that comes inside the package is used. Ctrl-C ends the collection and writes nothing;
with --partial the file of the last whole prompt stays.
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "imatrix",
        parents=[common],
        help="collect an importance matrix for `zimage quantize`",
        description="Draw an image of every prompt and write the mean square of each input channel of "
        "each weight, which `zimage quantize --imatrix` uses as the importance of its columns.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--component",
        choices=("transformer", "text_encoder", "both"),
        default="transformer",
        help="whose weights (default: transformer); the text encoder alone needs no denoising",
    )
    parser.add_argument(
        "--merge", action="append", default=[], metavar="FILE", help="add what this one holds"
    )
    output = add_study(parser, "imatrix.gguf")
    output.add_argument(
        "--format", choices=FORMATS, help="gguf, or dat of older llama.cpp (default: by the name, else gguf)"
    )
    output.add_argument("--json", action="store_true", help="print what was collected as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the arguments, load the model, collect, and write the file."""
    prompts = read_prompts(args.prompts)
    check_destination(args.output, args.force)
    if Path(args.output).suffix.lower() in _OTHER_ENDINGS:
        raise BadArgument(f"-o {printable(args.output)}: wanted a name that ends in .gguf, or in .dat")
    check_model(args)
    call = call_arguments(args, prompts)

    from zimage_core.quantize.imatrix import Imatrix, read_imatrix, write_imatrix

    earlier = Imatrix()
    for path in args.merge:
        earlier = earlier.merge(read_imatrix(path))
    check_call(args, call, prompts)
    progress = Progress(quiet=args.quiet)
    began = time.perf_counter()

    def write(imatrix: Imatrix) -> Imatrix:
        imatrix = imatrix.merge(earlier)
        write_imatrix(args.output, imatrix, args.format, args.force)
        args.force = True  # the next one replaces our own
        return imatrix

    def on_prompt(done: int, imatrix: Imatrix) -> None:
        progress.step(done, len(prompts), "prompts", "a prompt")
        if args.partial and done < len(prompts):
            write(imatrix)

    imatrix = write(_collect(args, prompts, call, earlier, progress, on_prompt))
    _report(args, imatrix, time.perf_counter() - began, progress)
    return 0


def _collect(
    args: argparse.Namespace,
    prompts: list[str],
    call: dict[str, Any],
    earlier: Imatrix,
    progress: Progress,
    on_prompt: OnPrompt,
) -> Imatrix:
    from zimage_core.study.collect import COMPONENTS, collect_imatrix, widths

    pipeline = load_pipeline(args)
    components = COMPONENTS if args.component == "both" else (args.component,)
    earlier.check_fits(widths(pipeline, components), fewest=0)
    if not args.partial:
        progress.say(f"{printable(args.output)} is written at the end; Ctrl-C before writes nothing")
    progress.start("collecting")
    imatrix = collect_imatrix(
        pipeline,
        prompts,
        components=components,
        dataset="standard input" if args.prompts == "-" else Path(args.prompts).name,
        on_prompt=on_prompt,
        **call,
    )
    progress.finish()
    return imatrix


def _report(args: argparse.Namespace, imatrix: Imatrix, seconds: float, progress: Progress) -> None:
    rows = max(sums.count for sums in imatrix.entries.values())
    size = Path(args.output).stat().st_size
    if args.json:
        entries = {
            name: {"channels": sums.width, "rows": sums.count} for name, sums in imatrix.entries.items()
        }
        record = {
            "path": args.output, "bytes": size, "images": imatrix.chunks, "seconds": seconds,
            "datasets": list(imatrix.datasets), "tensors": entries,
        }  # fmt: skip
        sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return
    sys.stdout.write(f"{printable(args.output, 4096)}\n")
    progress.say(
        f"{len(imatrix.entries)} tensors, {imatrix.chunks} images, up to {rows} rows a tensor, "
        f"{in_bytes(size)}, {seconds:.1f} s"
    )
