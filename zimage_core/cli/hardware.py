"""Where a command computes: the GPU if there is one, and as many threads as the work is worth."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from zimage_core.cli import ranks
from zimage_core.cli.messages import say
from zimage_core.errors import printable

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user chooses how threads wait for each other."""


def wait_passively() -> None:
    """Let threads sleep while they wait for others, unless the user chose; torch reads it when it is loaded.

    A thread that spins for another takes the core that the other needs, if a second program computes.
    """
    if not any(name in os.environ for name in WAIT):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def device_options(args: argparse.Namespace, fit: bool) -> dict[str, Any]:
    """The device and limits of memory, as arguments of the pipeline.

    Without --device this is the first GPU, which is said on stderr, or the CPU where torch can use no GPU.

    Args:
        args: The options of the verb.
        fit: Whether weights that a GPU of our own choice has no memory for may be streamed.
    """
    options = {name: value for name in ("vram", "ram") if (value := getattr(args, name)) is not None}
    wanted = ranks.device(args.device)
    if args.device != "auto":
        return {"device": wanted, **options}
    from zimage_core.run.checks import read_device

    where = read_device(wanted)
    if where.type == "cuda":
        import torch

        count = 1 if ranks.launched() else torch.cuda.device_count()
        others = f", the first of {count}; --device cuda:1 takes another" if count > 1 else ""
        if not args.quiet:
            say(f"device: {where} ({printable(torch.cuda.get_device_name(where))}{others})")
        if fit and not options:
            options["vram"] = "auto"
    return {"device": str(where), **options}


def settle_threads(pipeline: ZImagePipeline, args: argparse.Namespace) -> None:
    """Compute on one thread where a step is small. This changes the whole process, so it must be our own."""
    import torch

    from zimage_core.cpu.threads import SMALL_STEP, chosen
    from zimage_core.memory.rates import step_flops

    share = ranks.threads()
    if pipeline.device.type != "cpu" or (share is None and chosen()):
        return
    if share is not None:
        torch.set_num_threads(share)
    limits = pipeline.limits
    height, width = (getattr(args, side) or limits.sample_size for side in ("height", "width"))
    latents = (height // limits.factor, width // limits.factor)
    if step_flops(pipeline.transformer.config, *latents, 128) < SMALL_STEP:
        torch.set_num_threads(1)
