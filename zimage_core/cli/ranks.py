"""A command that torchrun started several times: rank 0 speaks and writes files, the others compute with it.

Environment variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which
torchrun sets, and ZIMAGE_RANK_TIMEOUT, the seconds that a rank waits for another during a run (default 60).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zimage_core.cli.messages import say
from zimage_core.errors import BadArgument, ZImageError

if TYPE_CHECKING:
    from zimage_core.parallel.group import Link
    from zimage_core.pipeline import ZImagePipeline

SHARED = ("generate",)
"""Verbs that several ranks run together."""
PATIENCE = 5.0
"""Seconds in which rank 0 shows an error of another rank, before that rank shows it itself."""
PARTING = 2.0
"""Seconds in which the other ranks read why rank 0 ends, as it may hold what they read that from."""
_link: Link | None = None


def launched() -> bool:
    """Whether this process is one of several that torchrun, or a program like it, started for one job."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def first() -> bool:
    """Whether this process speaks and writes: it is alone, or rank 0."""
    return not launched() or os.environ["RANK"] == "0"


def run(args: argparse.Namespace) -> int:
    """Run a verb on this rank; the exit status.

    A verb that ranks do not share runs on rank 0 alone, while the others leave.
    """
    if args.verb not in SHARED:
        if not first():
            return 0
        say(f"ranks: only {' and '.join(SHARED)} uses several; rank 0 runs {args.verb} alone")
        return int(args.run(args))
    from zimage_core.parallel.group import join_world, link_of, read_timeout

    global _link
    join_world()
    _link = link_of(range(int(os.environ["WORLD_SIZE"])), read_timeout(None))
    if not first():
        args.quiet = True
        warnings.simplefilter("ignore")
    try:
        status = int(args.run(args))
        _link.agree()  # torchrun ends all ranks where one left early
        return status
    except Exception as error:
        with suppress(Exception):
            _link.fail(str(error) if isinstance(error, ZImageError) else f"{type(error).__name__} {error}")
        raise


def keep_silent() -> None:
    """Let this process write nothing to stdout, as all ranks but the first do."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


def speaks_for(error: Exception) -> bool:
    """Whether this rank shows an error: rank 0 does, and another one that rank 0 does not answer."""
    if _link is None:  # the ranks did not meet
        return True
    if first():
        _link.note("shown")
        return True
    end = time.monotonic() + PATIENCE
    while not _link.noted("shown") and time.monotonic() < end and "rank 0" not in str(error):
        time.sleep(0.05)
    shown = _link.noted("shown")
    _link.note(f"left {_link.rank}")
    return not shown and _link.note("shown")


def part() -> None:
    """Let rank 0 of a failed command wait for the others to have read why."""
    if _link is None or not first():
        return
    end, others = time.monotonic() + PARTING, [f"left {rank}" for rank in _link.ranks[1:]]
    while time.monotonic() < end and not all(map(_link.noted, others)):
        time.sleep(0.05)


def share(value: Callable[[], Any]) -> Any:
    """What rank 0 gets from a function, on every rank: texts, numbers and lists of them."""
    if _link is None:
        return value()
    mine = value() if first() else None
    said = _link.agree(json.dumps(mine), first=True)
    return mine if first() else json.loads(said[0])


def parallelize(pipeline: ZImagePipeline, args: argparse.Namespace) -> None:
    """Let the ranks make each image together, half of them each side of guidance where that is possible."""
    if _link is None:
        return
    sides = args.guidance_ranks
    if sides is None:
        from zimage_core.run import checks

        usual = pipeline.limits.defaults(args.shift).guidance
        guided = checks.guidance(args.guidance_scale, args.cfg, usual) > 0
        sides = 2 if guided and len(_link.ranks) % 2 == 0 else 1
    pipeline.parallelize(guidance=sides)
    if first() and not args.quiet:
        each = f"{len(_link.ranks) // sides} for each side of guidance" if sides > 1 else "for each image"
        say(f"ranks: {len(_link.ranks)}, {each}")


def threads() -> int | None:
    """Threads of this rank on a CPU: its share of the cores; None where the user chose, or it is alone.

    torchrun sets OMP_NUM_THREADS to 1, which therefore counts as no choice.
    """
    if not launched() or os.environ.get("OMP_NUM_THREADS", "1") != "1" or "MKL_NUM_THREADS" in os.environ:
        return None
    own = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores() // max(1, int(own) if own.isdecimal() else 1))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device(wanted: str) -> str:
    """The device of this rank where --device is auto or cuda: its own GPU, or the CPU where torch has none.

    Raises:
        BadArgument: All ranks were told to take the same GPU.
    """
    if not launched() or wanted == "cpu":
        return wanted
    if wanted not in ("auto", "cuda"):
        raise BadArgument(f"--device {wanted}: each rank takes the GPU of its own number; leave it out")
    from zimage_core.parallel.group import device_of_rank

    return str(device_of_rank())
