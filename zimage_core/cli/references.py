"""The options for reference images and the vision tower that sees them."""

from __future__ import annotations

import argparse
from typing import Any

from zimage_core.assets import DEFAULT
from zimage_core.config import COMPONENTS, POSITIONS
from zimage_core.errors import BadArgument


def add_references(parser: argparse.ArgumentParser, model: argparse._ArgumentGroup) -> None:
    """The options; the vision tower's file is one of the group `model`."""
    model.add_argument(
        "--siglip", metavar="FILE", help="vision tower of an Omni checkpoint (default: that of the folder)"
    )
    group = parser.add_argument_group(
        "references", "Show images to an Omni checkpoint beside the prompt; docs/guides/omni.md has more."
    )
    group.add_argument(
        "--reference",
        dest="reference_images",
        action="append",
        metavar="FILE",
        help="image that the prompt speaks of; repeatable",
    )
    group.add_argument(
        "--positions",
        choices=POSITIONS,
        help="how their places are numbered: trained (default), or as diffusers does",
    )


def check_references(args: argparse.Namespace, call: dict[str, Any]) -> None:
    """Refuse options that do not go together, and images that cannot be read, before anything is loaded.

    Raises:
        BadArgument: Options do not go together.
        BadFile: An image cannot be read.
    """
    if "image" in call and not {"strength", "mask_image", "outpaint"} & call.keys():
        from zimage_core.editing.edit import STRENGTH

        call["strength"] = STRENGTH  # --image is what the run begins from, also beside a vision tower
    parts = [name for name in COMPONENTS if getattr(args, name) is not None]
    if args.siglip is not None and args.model is None and not parts:
        raise BadArgument("--siglip goes with --model or with the files of the three networks")
    if not args.reference_images:
        if args.positions is not None:
            raise BadArgument("--positions: it needs reference images; give --reference FILE too")
        return
    if args.model == DEFAULT and not parts:
        raise BadArgument("--reference: leave --model out for the Omni sibling of the embedded model")
    if args.hires is not None:
        raise BadArgument("--hires makes its own image; leave --reference out")
    if "control_image" in call or "variety" in call:
        name = "control" if "control_image" in call else "variety"
        raise BadArgument(f"--{name} has no meaning in a run with reference images; leave --reference out")
    from zimage_core.editing.images import open_images

    for image in args.reference_images:
        open_images(image, "--reference")
