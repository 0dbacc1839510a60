"""`zimage parity CHECKPOINT`: compare a checkpoint with diffusers, block by block."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from zimage_core.cli.messages import say

PEERS = ("diffusers",)
PARTS = ("transformer", "text_encoder", "vae", "latents")
_EPILOG = """\
The peers are diffusers, and transformers for the text encoder; you install them: pip install diffusers
transformers. Exit status: 0 every block is within its tolerance, 1 one is not or the comparison failed,
2 wrong command. docs/guides/parity.md says how to read the table, and has the fields of the JSON.
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "parity",
        parents=[common],
        help="whether a checkpoint computes here what it computes in diffusers, block by block",
        description="Run a checkpoint here and in diffusers on the same inputs; compare every block.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder, GGUF or safetensors file, repository org/repo[:Q4_K_M], or default",
    )
    parser.add_argument("--against", choices=PEERS, default="diffusers", help="the peer (default: diffusers)")
    parser.add_argument(
        "--only",
        dest="parts",
        action="append",
        choices=PARTS,
        help="compare this part; may be given several times (default: all that there are)",
    )
    parser.add_argument(
        "--float64", action="store_true", help="compare formulas, too, in float64; takes longer"
    )
    parser.add_argument(
        "--steps", type=int, default=2, metavar="N", help="steps whose latents are compared (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print the report; 1 if a block is outside its tolerance."""
    from zimage_core.parity import compare_with

    report = compare_with(
        args.checkpoint,
        args.against,
        parts=args.parts,
        float64=args.float64,
        steps=args.steps,
        on_part=None if args.quiet else say,
    )
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    sys.stdout.write((text if args.json else "\n".join(report.lines())) + "\n")
    return 0 if report.passes else 1
