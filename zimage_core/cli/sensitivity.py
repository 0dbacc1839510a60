"""`zimage sensitivity --prompts FILE`: measure the cost of each type in each tensor."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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

_EPILOG = """\
Without a model the one inside the package is used. Each tensor is stored in each type, alone, and
the velocity is compared on calls recorded from the real loop: tensors x types x calls runs of the network.
For a large model --probe Q3_K measures one type and takes the others by their weight errors.

example:
  zimage sensitivity --prompts prompts.txt --model Z-Image-Turbo --device cuda --probe Q3_K -o turbo.json
  zimage quantize Z-Image-Turbo turbo.gguf --size 3.5GB --sensitivity turbo.json
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "sensitivity",
        parents=[common],
        help="measure what each type costs in each tensor",
        description="Measure what quantising each tensor alone does to the predicted velocity.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--types", metavar="A,B", help="to choose among (default: the K types and Q8_0)")
    parser.add_argument(
        "--probe",
        metavar="TYPE",
        help="measure this type, estimate the others",
    )
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix, as for `zimage quantize`")
    parser.add_argument(
        "--every", type=int, default=4, metavar="N", help="keep one call of so many (default: 4)"
    )
    parser.add_argument(
        "--all-tensors", action="store_true", help="also embedders, refiners and the final layer"
    )
    add_study(parser, "sensitivity.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the arguments, load the model, record calls, measure, and write the file."""
    prompts = read_prompts(args.prompts)
    check_destination(args.output, args.force)
    if Path(args.output).suffix.lower() != ".json":
        raise BadArgument(f"-o {printable(args.output)}: JSON is written; wanted a name that ends in .json")
    check_model(args)
    if args.vram is not None or args.ram is not None:
        raise BadArgument("sensitivity: weights are exchanged in place; leave out --vram and --ram")
    call = call_arguments(args, prompts)

    from zimage_core.export.sensitivity import Sensitivity, write_sensitivity
    from zimage_core.export.sizing import FAST
    from zimage_core.quantize.imatrix import read_imatrix
    from zimage_core.study.sensitivity import check_imatrix, check_types, measure
    from zimage_core.study.velocity import record

    types = FAST if args.types is None else tuple(name.strip() for name in args.types.split(","))
    check_types((*types, *([args.probe] if args.probe else [])))
    imatrix = None if args.imatrix is None else read_imatrix(args.imatrix)
    check_call(args, call, prompts)
    progress = Progress(quiet=args.quiet)

    def write(sensitivity: Sensitivity) -> None:
        write_sensitivity(sensitivity, args.output, args.force)
        args.force = True  # the next one replaces our own

    pipeline = load_pipeline(args)
    check_imatrix(pipeline, imatrix, args.all_tensors)
    if not args.partial:
        progress.say(f"{printable(args.output)} is written at the end; Ctrl-C before writes nothing")
    progress.start("recording")
    calls = record(pipeline, prompts, every=args.every, **call)
    progress.start("measuring")
    sensitivity = measure(
        pipeline,
        calls,
        types,
        imatrix=imatrix,
        probe=args.probe,
        every_tensor=args.all_tensors,
        settings={
            "prompts": "standard input" if args.prompts == "-" else Path(args.prompts).name,
            "images": len(prompts),
            "calls": len(calls),
            "probe": args.probe,
            "imatrix": None if args.imatrix is None else Path(args.imatrix).name,
            **call,
        },
        on_tensor=lambda done, runs, name: progress.step(done, runs, name, "a run"),
        on_costs=write if args.partial else None,
    )
    progress.finish()
    write(sensitivity)
    sys.stdout.write(f"{printable(args.output)}: {len(sensitivity.costs)} tensors, {len(types)} types\n")
    for name, costs in sorted(sensitivity.costs.items(), key=lambda item: -max(item[1].values()))[:5]:
        worst = max(costs, key=lambda fmt: costs[fmt])
        sys.stdout.write(f"  {name} in {worst}: velocity off by {costs[worst] ** 0.5:.2%}\n")
    return 0
