"""Reference images: opened, resized and cropped as diffusers' ZImageOmniPipeline does, to the bit.

An image above a million pixels is made smaller in proportion. The vision tower sees it whole. The VAE sees it
with its sides cut to multiples of 16, in the middle.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zimage_core.editing.images import open_images
from zimage_core.errors import BadArgument, printable
from zimage_core.models.omni import Reference

AREA = 1024 * 1024
"""Pixels above which a reference is made smaller."""
LONG = 8.0
"""Greatest ratio of the sides that diffusers accepts; a longer image is warned of."""

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [B, 3, H, W] in [-1, 1] -> mean and log-variance of their latents [B, C, h, w] on the CPU."""
Encode = Callable[[Tensor], Tensor]
"""Pixels uint8 [H, W, 3] -> features [h, w, width] of the vision tower."""


@dataclass(frozen=True)
class Picture:
    """One reference image, resized.

    Args:
        image: Mode RGB, as the vision tower sees it.
        multiple: Pixels per token along a side; the VAE sees sides cut to multiples of it.
        given: Width and height of the image as it was given.
        name: Name of its file; empty for an image from memory.
        sha256: Hash of its file or values.
    """

    image: Image.Image
    multiple: int
    given: tuple[int, int]
    name: str
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the VAE sees."""
        width, height = (side // self.multiple * self.multiple for side in self.image.size)
        return height, width

    def pixels(self) -> Tensor:
        """What the vision tower sees: uint8 [H, W, 3]."""
        return torch.from_numpy(np.array(self.image))

    def canvas(self) -> Tensor:
        """What the VAE sees: float32 [1, 3, height, width] in [-1, 1]."""
        height, width = self.size
        left, top = (self.image.width - width) // 2, (self.image.height - height) // 2
        cropped = self.image.crop((left, top, left + width, top + height))
        values = np.array(cropped).astype(np.float32) / 255.0
        return 2.0 * torch.from_numpy(values.transpose(2, 0, 1).copy())[None] - 1.0

    def settings(self) -> dict[str, Any]:
        """What the settings of an image say of it: never a path."""
        height, width = self.size
        named = {"name": self.name} if self.name else {}
        return {**named, "width": width, "height": height, "sha256": self.sha256}


@dataclass(frozen=True)
class References:
    """The reference images of a run.

    Args:
        pictures: The references of each image of the run, in order; images of a prompt share the objects.
        positions: Name of the positions, as `OmniTransformer` knows them.
        clean: Picture (by its id) -> what the stream holds of it, known once it is encoded.
    """

    pictures: tuple[tuple[Picture, ...], ...]
    positions: str
    clean: dict[int, Reference]

    def different(self) -> list[Picture]:
        """Each picture once."""
        return list({id(each): each for member in self.pictures for each in member}.values())

    def counts(self) -> list[int]:
        """Number of references of each image of the run."""
        return [len(member) for member in self.pictures]

    def of(self, image: int) -> tuple[Reference, ...]:
        """What the stream of an image holds of its references."""
        return tuple(self.clean[id(each)] for each in self.pictures[image])

    def with_latents(self, moments: Moments, scaling: float, shift: float) -> References:
        """The same with the latents of each picture: the mode of the VAE's posterior, as in diffusers."""
        found = {}
        for each in self.different():
            mean, _ = moments(each.canvas())
            found[id(each)] = Reference((mean[0] - shift) * scaling, None)
        return replace(self, clean=found)

    def with_features(self, encode: Encode) -> References:
        """The same with the features of each picture."""
        found = dict(self.clean)
        for each in self.different():
            features = encode(each.pixels())
            found[id(each)] = found.get(id(each), Reference(None, None))._replace(features=features)
        return replace(self, clean=found)

    def settings(self, index: int) -> dict[str, Any]:
        """What the settings of an image say."""
        shown = [each.settings() for each in self.pictures[index]]
        return {"reference_images": shown, "positions": self.positions}

    def remarks(self) -> list[str]:
        """Warnings about what is allowed but probably a mistake."""
        found = []
        for each in self.different():
            width, height = each.given
            if max(width, height) > LONG * min(width, height):
                found.append(
                    f"reference_images: one of {width} x {height} pixels is longer than {LONG:g} to 1, which "
                    "diffusers refuses; expect little of it, or crop it"
                )
        return found[:1]


def open_references(
    value: Any, prompts: int, area: int | None, multiple: int, most: tuple[int, int], count: int = 256
) -> list[tuple[Picture, ...]]:
    """Read, check and resize the reference images of a call.

    Args:
        value: An image or a list of them, of any kind that `editing.images` takes, for all prompts; or a list
            of such lists, one for each prompt. An empty list means none.
        prompts: Number of prompts.
        area: Pixels that a larger image is brought to; None for a million.
        multiple: Pixels per token along a side.
        most: Most pixels of a height and of a width.
        count: Most images of a prompt.

    Returns:
        The pictures of each prompt; those that prompts share are the same objects.

    Raises:
        BadArgument, BadShape, BadFile: An image cannot be read, is too small or too long, or there are too
            many or lists for another number of prompts.
    """
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    nested = [isinstance(each, (list, tuple)) for each in listed]
    if not any(nested):
        return [_opened(listed, "reference_images", area, multiple, most, count)] * prompts
    if not all(nested) or len(listed) != prompts:
        raise BadArgument(
            f"reference_images: got {sum(nested)} lists and {len(listed) - sum(nested)} images for {prompts} "
            "prompts, wanted one list of images for all, or a list for each prompt"
        )
    return [
        _opened(each, f"reference_images[{i}]", area, multiple, most, count) for i, each in enumerate(listed)
    ]


def _opened(
    listed: Sequence[Any], name: str, area: int | None, multiple: int, most: tuple[int, int], count: int
) -> tuple[Picture, ...]:
    found: list[Picture] = []
    if len(listed) > count:
        raise BadArgument(f"{name}: got {len(listed)} images, wanted at most {count}; give fewer")
    for i, each in enumerate(listed):
        where = f"{name}[{i}]"
        opened = open_images(each, where)
        if len(found) + len(opened) > count:
            raise BadArgument(f"{name}: got more than {count} images, wanted at most so many; give fewer")
        file = Path(os.fspath(each)).name if isinstance(each, (str, os.PathLike)) else ""
        for member in opened.members:
            image = _rgb(member)
            picture = Picture(
                _smaller(image, area or AREA), multiple, image.size, printable(file, 100), opened.sha256[0]
            )
            _check(picture, where, most)
            found.append(picture)
    return tuple(found)


def _rgb(member: Image.Image | Tensor) -> Image.Image:
    """An opened image in mode RGB; floats are rounded to 8 bits, which the vision tower takes."""
    if isinstance(member, Image.Image):
        return member if member.mode == "RGB" else member.convert("RGB")
    levels = (member.expand(3, -1, -1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _smaller(image: Image.Image, area: int) -> Image.Image:
    """An image above a million pixels in a size of `area` pixels, with the arithmetic of diffusers."""
    width, height = image.size
    if width * height <= AREA:
        return image
    scale = math.sqrt(area / (width * height))
    size = int(width * scale), int(height * scale)
    return image.resize((max(1, size[0]), max(1, size[1])), Image.Resampling.LANCZOS)


def _check(picture: Picture, name: str, most: tuple[int, int]) -> None:
    width, height = picture.given
    shown = f"{name}: an image of {width} x {height} pixels"
    if picture.image.size != picture.given:
        shown += " (made smaller: {} x {})".format(*picture.image.size)
    if 0 in picture.size:
        raise BadArgument(f"{shown} is too small, each side needs {picture.multiple} pixels; enlarge it")
    if picture.size[0] > most[0] or picture.size[1] > most[1]:
        raise BadArgument(
            f"{shown} is too long, wanted at most {most[1]} x {most[0]}; cut it or make it smaller"
        )
