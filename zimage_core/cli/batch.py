"""`zimage batch IN OUT`: an image of every row of a table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core.cli.messages import line, say
from zimage_core.cli.model_options import add_image, add_model, check_model, given
from zimage_core.cli.progress import Progress
from zimage_core.errors import BadRows, printable

if TYPE_CHECKING:
    from zimage_core.batch.dataset import Report

FORMATS = ("png", "webdataset", "parquet")
"""`batch.shards.FORMATS`, which a parser does not import."""
SHOWN = 10
"""Most bad rows, and most failures, that are listed."""
_EPILOG = """\
IN is JSON lines ({"prompt": "a red circle", "seed": 5} a line), CSV with a header, Parquet, or text with a
prompt a line; - is standard input. A column is any argument of a call or the name of an option of
`zimage generate`: prompt, negative, seed, width, height, steps, guidance, image, strength, mask, control,
lora (FILE:WEIGHT) and so on. The options of the image below are for rows that do not give them.

Rows that are done are skipped, so the same command goes on after an interruption.
Exit status: 0 all rows are done, 1 some failed, 2 the command or a row was wrong, 130 interrupted.
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "batch",
        parents=[common],
        help="make an image of every row of a table",
        description="Make an image of every row of a table, as PNG files, WebDataset shards or Parquet.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="IN", help="JSON lines, CSV, Parquet or text; - is standard input")
    parser.add_argument("out", metavar="OUT", help="folder; new, empty, or that of an earlier run")
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the dataset (default: png)")
    parser.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="images of a shard (default: 1000)"
    )
    parser.add_argument(
        "--ray", nargs="?", const=True, metavar="ADDRESS",
        help="draw on a Ray cluster: the one at ADDRESS, or a new one on this machine",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="workers on Ray (default: one a GPU of the cluster; without GPUs, as many as it has CPUs for)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, metavar="N",
        help="threads on a CPU; their number changes the last bits of an image (default: OMP_NUM_THREADS; "
        "1 for a small model; else one a core)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be drawn")
    parser.add_argument(
        "--keep", metavar="COLUMNS", default="", help="columns that only go into the index, such as id,source"
    )
    model = add_model(parser)
    model.add_argument("--siglip", metavar="FILE", help="vision tower of an Omni checkpoint")
    model.add_argument(
        "--controlnet", dest="controlnets", action="append", metavar="FILE",
        help="ControlNet of rows with a control image; repeatable",
    )  # fmt: skip
    add_image(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--no-metadata", action="store_true", help="write no prompt and settings into PNGs")
    output.add_argument("--json", action="store_true", help="print a report as JSON")
    output.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the table, draw what is not done yet, report."""
    check_model(args)
    from dataclasses import fields

    from zimage_core.batch.dataset import generate_dataset
    from zimage_core.batch.model import Model
    from zimage_core.run.request import Request

    model = given(args, (field.name for field in fields(Model)))
    defaults = given(args, (field.name for field in fields(Request)))
    show = _Show(args)
    try:
        with _interruptible(args):
            report = generate_dataset(
                args.table,
                args.out,
                format=args.format,
                shard_size=args.shard_size,
                ray=args.ray,
                workers=args.workers,
                threads=args.threads,
                limit=args.limit,
                skip_bad=args.skip_bad,
                keep=[name for name in args.keep.split(",") if name],
                defaults=defaults,
                metadata=not args.no_metadata,
                on_progress=show,
                **model,
            )
    except BadRows as error:
        for number, reason in error.rows[:SHOWN]:
            say(line(f"row {number}: {reason}"))
        count = "1 row" if error.count == 1 else f"{error.count} rows"
        say(
            f"error: {printable(args.table)}: {count} cannot be drawn, nothing was computed; "
            "correct the table, or leave such rows out with --skip-bad"
        )
        return 2
    except KeyboardInterrupt:
        show.end()
        say(f"interrupted: {show.made} images were made and are kept; the same command goes on from there")
        return 130
    show.end()
    _tell(args, report)
    return 1 if report.failed else 0


class _Show:
    """Shows progress after each image."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._progress = Progress(quiet=args.quiet)
        self._progress.start("images")
        self.made = 0

    def __call__(self, report: Report) -> None:
        self.made = report.made
        tried = report.made + report.failed_count
        pace = f"{report.images_per_hour:.0f} images an hour" if report.made else "drawing"
        left = report.seconds / tried * report.left if tried else 0.0
        failed = f", {report.failed_count} failed" if report.failed_count else ""
        text = f"{report.rows - report.left}/{report.rows} images, {pace}{failed}"
        self._progress.count(report.rows - report.left, report.rows, text, f", {_span(left)} left")

    def end(self) -> None:
        """Clear the bar."""
        self._progress.finish()


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def _tell(args: argparse.Namespace, report: Report) -> None:
    """The report, as JSON or in a few lines."""
    out = Path(args.out)
    if args.json:
        failures = [{"row": failed.row.number, "reason": failed.reason} for failed in report.failed]
        found = {
            "out": str(out), "rows": report.rows, "made": report.made, "skipped": report.skipped,
            "failed": failures, "bad": [{"row": n, "reason": r} for n, r in report.bad],
            "bad_count": report.bad_count, "seconds": report.seconds,
            "images_per_hour": report.images_per_hour,
        }  # fmt: skip
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write(f"{printable(out, 4096)}\n")
    for what, rows, count in (
        ("left out", report.bad, report.bad_count),
        ("failed", [(failed.row.number, failed.reason) for failed in report.failed], len(report.failed)),
    ):
        for number, reason in rows[:SHOWN]:
            say(line(f"row {number} {what}: {reason}"))
        if count > SHOWN:
            say(f"{count - SHOWN} more rows {what}")
    if not args.quiet:
        pace = f", {report.images_per_hour:.0f} images an hour" if report.made else ""
        failed = f", {len(report.failed)} failed (see {out / 'failures.jsonl'})" if report.failed else ""
        say(f"{report.made} images made{pace}, {report.skipped} done before{failed}")


@contextmanager
def _interruptible(args: argparse.Namespace) -> Iterator[None]:
    """Let the first Ctrl-C end the run after what is finished is saved, and a second one end it at once."""
    if not args.own_process:
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)
