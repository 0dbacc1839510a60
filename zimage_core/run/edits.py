"""Runs that begin from an image: their arguments, and the calls that the pipeline has for them.

The work is done in `editing/`, which is imported when a call gives an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from zimage_core.errors import BadArgument
from zimage_core.run import checks

if TYPE_CHECKING:
    from zimage_core.editing.edit import Edit, Given

MAX_MARGIN = 8192
MAX_BLUR = 1024.0


def check(request: Any) -> tuple[int, ...] | None:
    """Check the numbers of a request that begins from an image, and that no argument lacks another.

    Returns:
        The margins to paint around the image.

    Raises:
        BadArgument: A number is out of range, or an argument needs another one.
    """
    for name in ("mask_image", "outpaint", "strength") if request.image is None else ():
        if getattr(request, name) is not None:
            raise BadArgument(f"{name}: it needs image, the image to begin from; give both")
    blur = checks.real("mask_blur", request.mask_blur, 0, MAX_BLUR)
    if blur and request.mask_image is None and request.outpaint is None:
        raise BadArgument("mask_blur: it needs mask_image or outpaint, whose edge it makes soft; give one")
    if request.strength is not None and checks.real("strength", request.strength, 0, 1) == 0:
        raise BadArgument("strength: got 0, which leaves no step to run; wanted more than 0, up to 1")
    margins = request.outpaint
    if margins is None:
        return None
    if not isinstance(margins, (list, tuple)) or len(margins) != 4:
        raise BadArgument(
            f"outpaint: got {checks.shown(margins)}, wanted four numbers of pixels: left, top, right, bottom"
        )
    found = tuple(checks.whole("outpaint", each, 0, MAX_MARGIN) for each in margins)
    if not any(found):
        raise BadArgument("outpaint: got four zeros, wanted at least one side that grows")
    return found


def given(request: Any, limits: Any) -> Given | None:
    """The image of a request, opened and checked; None for text to image.

    Args:
        request: The `Request`.
        limits: The `Limits` of the pipeline.

    Raises:
        BadArgument, BadShape, BadFile: An argument cannot be used, or needs another one.
    """
    margins = check(request)
    if request.image is None:
        return None
    from zimage_core.editing.edit import Given

    size = (limits.channels, limits.factor, limits.factor * limits.patch)
    return Given.open(request.image, request.mask_image, margins, *size)


def make_edit(
    request: Any,
    given: Given,
    shape: tuple[int, int, int, int],
    generator: torch.Generator | Sequence[torch.Generator],
    own: bool,
    latents: torch.Tensor | None,
    steps: int,
) -> Edit:
    """What is made of a given image; `editing.edit.make_edit` describes the arguments.

    Raises:
        BadArgument: The numbers of images, masks and generators do not fit each other.
    """
    from zimage_core.editing import edit

    strength = request.strength
    if strength is None:
        strength = edit.MASKED_STRENGTH if given.masked else edit.STRENGTH
    blur = float(request.mask_blur)
    return edit.make_edit(given, shape, generator, own, latents, float(strength), steps, blur)
