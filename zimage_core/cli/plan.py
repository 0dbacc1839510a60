"""`zimage plan ...`: what a picture needs and what a budget gives, before a byte of weights is read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from zimage_core.cli import plan_picture
from zimage_core.errors import BadArgument, OverBudget
from zimage_core.memory.budget import read_bytes
from zimage_core.memory.plan import Plan, make_plan
from zimage_core.memory.rates import known
from zimage_core.memory.sizes import COMPONENTS, folder_files, read_sizes

CARDS = (4, 6, 8, 12, 16, 24)
"""GiB of GPU memory of common cards, for the table without --vram."""
EMBEDDED = Path(__file__).parent.parent / "assets" / "nano"
MOST_SIDE, MOST = 8192, 1024


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "plan",
        parents=[common],
        help="say what a picture needs in memory, and what a budget gives",
        description="Say from headers alone what lies where in each phase of a run, how much memory that is "
        "and how long it should take. Without --vram: what cards of 4 to 24 GiB give. Needs no GPU.",
    )
    parser.add_argument("--model", metavar="FOLDER", help="default: the embedded model")
    for name in COMPONENTS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="FILE", help="taken instead of the folder's"
        )
    parser.add_argument("--vram", metavar="BYTES", help="GPU memory for the run: 6GiB, 6GB, 6g or bytes")
    parser.add_argument("--ram", metavar="BYTES", help="host memory, likewise; default: enough")
    parser.add_argument("-W", "--width", type=int, default=1024, metavar="PX")
    parser.add_argument("-H", "--height", type=int, default=1024, metavar="PX")
    parser.add_argument("-n", "--count", type=int, default=1, metavar="N", help="pictures of one run")
    parser.add_argument("--caption", type=int, default=128, metavar="TOKENS", help="default 128")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument(
        "--guidance", action="store_true", help="with a negative side, as the base model runs"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: float16 before Ampere, else bfloat16",
    )
    parser.add_argument("--architecture", default="sm_86", metavar="NAME", help="of the GPU, default sm_86")
    parser.add_argument(
        "--link", type=float, metavar="GB/s", help="from host to GPU; default: its usual slot"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one plan, or a line for each common card."""
    vram = None if args.vram is None else read_bytes("--vram", args.vram)
    ram = None if args.ram is None else read_bytes("--ram", args.ram)
    limits = {"count": MOST, "caption": MOST, "steps": MOST, "width": MOST_SIDE, "height": MOST_SIDE}
    for name, most in limits.items():
        if not 1 <= getattr(args, name) <= most:
            raise BadArgument(f"--{name}: got {getattr(args, name)}, wanted 1 to {most}")
    if args.link is not None and not 0 < args.link <= 1e6:
        raise BadArgument(f"--link: got {args.link:g}, wanted a positive number of GB/s")
    rates = known(args.architecture, None if args.link is None else args.link * 1e9)
    old = args.architecture in ("sm_70", "sm_72", "sm_75")
    sizes = read_sizes(_paths(args), args.dtype or ("float16" if old else "bfloat16"))

    def plan(budget: int | None) -> Plan:
        return make_plan(
            sizes, args.width, args.height, args.count, args.caption,
            vram=budget, ram=ram, rates=rates, guidance=args.guidance, steps=args.steps,
        )  # fmt: skip

    if vram is not None:
        found = plan(vram)
        text = json.dumps(found.to_json(), indent=2)
        shown = text if args.json else "\n".join(plan_picture.lines(found, _blocks(sys.stdout)))
        sys.stdout.write(shown + "\n")
        return 0
    cards: dict[str, Plan | str] = {}
    for name, budget in (*((f"{gib} GiB", gib << 30) for gib in CARDS), ("no limit", None)):
        try:
            cards[name] = plan(budget)
        except OverBudget as error:
            cards[name] = str(error)
    if args.json:
        data = {k: v if isinstance(v, str) else v.to_json() for k, v in cards.items()}
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(plan_picture.cards(cards)) + "\n")
    return 0


def _paths(args: argparse.Namespace) -> dict[str, str]:
    """The file or folder of each network."""
    given = {name: getattr(args, name) for name in COMPONENTS if getattr(args, name) is not None}
    if len(given) == len(COMPONENTS):
        return given
    if args.model is None and given:
        missing = " and ".join(f"--{n.replace('_', '-')}" for n in COMPONENTS if n not in given)
        raise BadArgument(f"a plan needs all three networks: give {missing} too, or --model FOLDER")
    return {**folder_files(args.model or EMBEDDED), **given}


def _blocks(stream: Any) -> bool:
    """Whether the stream can show block characters."""
    try:
        plan_picture.BLOCKS.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
