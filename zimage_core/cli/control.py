"""The options for control images and ControlNets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core.assets import DEFAULT
from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

EDGES = "edges"
"""Name of the ControlNet of the embedded model."""


def add_control(parser: argparse.ArgumentParser) -> None:
    """The options; those that may be repeated belong together in their order."""
    group = parser.add_argument_group(
        "control", "Follow an image, such as edges; docs/guides/control.md has more."
    )
    group.add_argument(
        "--control", dest="control_image", action="append", metavar="FILE", help="image to follow; repeatable"
    )
    group.add_argument(
        "--controlnet", action="append", metavar="FILE",
        help=f"ControlNet that follows it, or one for each (default for the embedded model: {EDGES})",
    )  # fmt: skip
    for name, dest, text in (
        ("scale", "controlnet_conditioning_scale", "strength of the control (default: 0.75)"),
        ("start", "control_guidance_start", "share of the steps after which it begins (default: 0)"),
        ("end", "control_guidance_end", "share of the steps after which it ends (default: 1)"),
    ):
        group.add_argument(
            f"--control-{name}",
            dest=dest,
            type=float,
            action="append",
            metavar="X",
            help=f"{text}; repeatable",
        )


def read_controlnets(args: argparse.Namespace, call: dict[str, Any]) -> list[str | Path]:
    """Check the options before anything is loaded, and return the ControlNets to load.

    A number that is given once is for all images.

    Raises:
        BadArgument: Options do not go together.
        BadFile, WrongModel, BadWeights: A file cannot be used.
    """
    numbers = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    images = call.get("control_image")
    if not images:
        named = (
            "--controlnet"
            if args.controlnet
            else next((f"--control-{name.rpartition('_')[2]}" for name in numbers if name in call), "")
        )
        if named:
            raise BadArgument(f"{named}: it needs an image to follow; give --control FILE too")
        return []
    for name in numbers:
        if len(call.get(name, ())) == 1:
            call[name] = call[name][0]
    nets: list[str | Path] = [*(args.controlnet or ())]
    if not nets:
        own = args.model in (None, DEFAULT) and not any(
            getattr(args, part) is not None for part in COMPONENTS
        )
        if not own:
            raise BadArgument("--control: it needs a ControlNet for this model; give --controlnet FILE too")
        nets = [EDGES]
    from zimage_core.control.load import checked, located
    from zimage_core.editing.images import open_images
    from zimage_core.weights.components import open_component

    for image in images:
        open_images(image, "--control")
    for net in nets:
        opened = open_component(located(net), "", mmap=False)
        try:
            checked(opened)
        finally:
            opened.file.close()
    return nets


def load_controlnets(pipeline: ZImagePipeline, nets: Sequence[str | Path]) -> None:
    """Load ControlNets into a pipeline, in this order; a second one of a name gets a number."""
    stems = [Path(net).stem for net in nets]
    for i, (net, stem) in enumerate(zip(nets, stems, strict=True)):
        pipeline.load_controlnet(net, stem if stems.index(stem) == i else f"{stem}-{i + 1}")
