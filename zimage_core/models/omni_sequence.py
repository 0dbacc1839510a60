"""Positions of an Omni stream: text, images and their vision features in turn. No parameters.

A counter p starts at 1. Piece j of the caption, of L_j tokens, lies at (p + i, 0, 0); the image behind it has
t = p + L_j and its vision features t = p + L_j + 1; the next piece starts at p + L_j + 2. Missing images and
features, and pads of both, are at (0, 0, 0). Pads of a piece continue its count (p + L_j and on), though the
counter does not pass over them: they share t with the images behind the piece, where h or w tell them apart
but in the corner. diffusers and ComfyUI number them so, which says that the model was trained so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zimage_core.config import PAD_MULTIPLE, POSITIONS, TransformerConfig
from zimage_core.errors import BadArgument, printable
from zimage_core.models.sequence import image_positions, pad_count

Size = tuple[int, int]
"""Rows and columns."""


class Positions(NamedTuple):
    """Positions (t, h, w), int64 [tokens, 3], pads included.

    Args:
        captions: Those of each piece.
        images: Those of each image.
        features: Those of each image's vision features; empty where the stream has none.
    """

    captions: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    features: tuple[Tensor, ...]


def numbering(wanted: str) -> str:
    """`wanted`, if it is one of `POSITIONS`.

    Raises:
        BadArgument: It is not.
    """
    if wanted not in POSITIONS:
        raise BadArgument(
            f"positions: got {printable(wanted, 40)!r}, wanted one of {', '.join(map(repr, POSITIONS))}"
        )
    return wanted


def positions_of(
    lengths: Sequence[int],
    images: Sequence[Size | None],
    features: Sequence[Size | None],
    patch: int,
    numbers: str,
) -> Positions:
    """Positions of one sample's stream.

    Args:
        lengths: Tokens of each piece of the caption, without pads; as many as images at least.
        images: Size of each image in patches; None for a missing one.
        features: Size of each image's vision features; None for missing ones, empty for no such tokens.
        patch: Latents a side of a patch.
        numbers: One of `POSITIONS`.
    """
    captions, ends = caption_positions(lengths, numbers)
    return Positions(
        captions,
        tuple(
            _missing() if size is None else image_positions(*size, end - 1)
            for size, end in zip(images, ends, strict=False)
        ),
        tuple(
            _missing() if size is None else feature_positions(size, image, end + 1, patch)
            for size, image, end in zip(features, images, ends, strict=False)
        ),
    )


def caption_positions(lengths: Sequence[int], numbers: str) -> tuple[tuple[Tensor, ...], list[int]]:
    """Positions of each piece, and t of the image behind each."""
    parts, ends, p = [], [], 1
    for length in lengths:
        pads = pad_count(length)
        ids = torch.zeros(length + pads * (2 if numbers == "diffusers" else 1), 3, dtype=torch.int64)
        ids[: length + pads, 0] = torch.arange(p, p + length + pads)
        parts.append(ids)
        p += length
        ends.append(p)
        p += 2
    rows = [length + pad_count(length) for length in lengths]
    return torch.split(torch.cat(parts)[: sum(rows)], rows), ends


def feature_positions(size: Size, image: Size | None, t: int, patch: int) -> Tensor:
    """Positions of the vision features of an image, spread over its latents, and of their pads.

    Not over its patches, as one would think: diffusers spreads them over latents, and ComfyUI likewise over
    eight for each feature. In float32 and cut to whole numbers as diffusers does.
    """
    ids = image_positions(*size, t - 1)
    if image is not None:
        for axis in (1, 2):
            span = image[axis - 1] * patch - 1
            ids[:, axis] = (ids[:, axis].float() / max(size[axis - 1] - 1, 1) * span).long()
    return ids


def _missing() -> Tensor:
    return torch.zeros(PAD_MULTIPLE, 3, dtype=torch.int64)


def check_positions(config: TransformerConfig, found: Positions, text: int) -> None:
    """Refuse a stream longer than the positions of the model.

    Args:
        config: The transformer's.
        found: Positions of the stream.
        text: Tokens of all pieces of the caption, for the message.

    Raises:
        BadArgument: The caption with its images, or a side of one, is too long.
    """
    t, h, w = (int(most) for most in torch.cat((*found.captions, *found.images, *found.features)).amax(0))
    t_max, h_max, w_max = config.axes_lens
    if t >= t_max:
        raise BadArgument(
            f"omni: {text} tokens of text and {len(found.images)} images, two positions each, reach position "
            f"{t}, this transformer ends at {t_max - 1}; shorten the prompt or give fewer reference images"
        )
    if h >= h_max or w >= w_max:
        raise BadArgument(
            f"omni: an image or its vision features reach position ({h}, {w}), this transformer ends at "
            f"({h_max - 1}, {w_max - 1}); choose a smaller size"
        )
