"""Runs with reference images, on an Omni checkpoint: the arguments, and the captions in pieces.

The work is done in `omni/`, which is imported when a call gives references.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zimage_core.config import POSITIONS
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.run import checks
from zimage_core.run.batch import Batch

if TYPE_CHECKING:
    from zimage_core.omni.references import References

MOST = 256
"""Most reference images of a prompt; each takes four positions of the 1,536 that the transformer knows."""
LACKS = "it has no siglip_embedder, siglip_refiner and siglip_pad_token"


def given(request: Any, limits: Any, batch: Batch) -> References | None:
    """The reference images of a request, opened, checked and resized; None for a run without.

    Args:
        request: The `Request`.
        limits: The `Limits` of the pipeline.
        batch: The captions of the request.

    Raises:
        BadArgument, BadShape, BadFile: An argument cannot be used, or needs another one.
        Unsupported: The transformer has no vision branch, or an argument has no meaning in such a run.
    """
    if request.reference_images is None:
        if request.positions is not None:
            raise BadArgument("positions: it needs reference_images, whose places it names; give both")
        return None
    if limits.vision is None:
        raise Unsupported(
            f"reference_images: this transformer takes text alone, {LACKS}; get an Omni checkpoint (its "
            "config.json states siglip_feat_dim) with its vision tower (siglip=)"
        )
    unfit = {
        "control_image": request.control_image is not None,
        "variety": bool(request.variety),
        "prompt_template": request.prompt_template is not None,
    }
    for name in (name for name, asked in unfit.items() if asked):
        raise Unsupported(f"{name}: it has no meaning in a run with reference images; leave one of them out")
    positions = checks.named("positions", request.positions, POSITIONS[0], POSITIONS)
    from zimage_core.omni.references import References, open_references

    multiple = limits.factor * limits.patch
    most = (multiple * limits.rows, multiple * limits.cols)
    area = None
    if request.height is not None and request.width is not None:
        sides = zip(("height", "width"), (request.height, request.width), most, strict=True)
        height, width = (checks.side(name, value, multiple, limit) for name, value, limit in sides)
        area = height * width
    times = checks.whole("num_images_per_prompt", request.num_images_per_prompt, 1, checks.MAX_IMAGES)
    # the vision features of an image are spread over its latents, and not over its tokens
    longest = (limits.factor * limits.rows, limits.factor * limits.cols)
    opened = open_references(request.reference_images, batch.images // times, area, multiple, longest, MOST)
    return References(tuple(each for each in opened for _ in range(times)), positions, {})


def batch_of(batch: Batch, shown: References) -> Batch:
    """The captions in pieces, with the places of the references between them.

    Raises:
        BadArgument: Caption features were given in another number of pieces.
    """
    counts = shown.counts()
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        for member, count in zip(getattr(batch, name) or (), counts, strict=False):
            wanted = count + 2 if count else 1
            if len(member) != wanted:
                raise BadArgument(
                    f"{name}: got {len(member)} tensors for a prompt with {count} reference images, wanted "
                    f"{wanted}, one for each piece (docs/guides/omni.md)"
                )
    return replace(batch, references=tuple(counts))


def size(shown: References, height: Any, width: Any) -> tuple[Any, Any]:
    """Height and width of the run: the caller's, else those of the last reference, as in diffusers.

    Raises:
        BadArgument: The last references of several prompts have different sizes.
    """
    last = {member[-1].size for member in shown.pictures if member}
    if len(last) > 1 and (height is None or width is None):
        found = " and ".join("{1} x {0}".format(*each) for each in sorted(last)[:2])
        raise BadArgument(
            f"height and width: the last references of the prompts say {found}; give both numbers"
        )
    own = next(iter(last), (None, None))
    return own[0] if height is None else height, own[1] if width is None else width
