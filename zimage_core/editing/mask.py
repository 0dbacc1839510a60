"""Masks: where an image is painted anew (1), and where it stays (0).

A mask becomes grey, gets the size of the image (by diffusers' resize), and is cut at one half. The latents
have one value for 8 x 8 pixels, of which the first is taken, as in diffusers. Pixels are pasted by the mask
itself, so that those outside come back as they were, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.editing.images import Pictures


class Margins(NamedTuple):
    """Pixels by which an image grows at each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def rounded(self, height: int, width: int, multiple: int) -> Margins:
        """Margins with which an image of this size has sides that are multiples of `multiple`.

        What is missing is added where the image grows, at the right and bottom if it does there or nowhere.
        """
        left, top, right, bottom = self
        across = -(left + width + right) % multiple
        down = -(top + height + bottom) % multiple
        if left and not right:
            left, across = left + across, 0
        if top and not bottom:
            top, down = top + down, 0
        return Margins(left, top, right + across, bottom + down)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """The margins as torch's `pad` takes them."""
        return self.left, self.right, self.top, self.bottom


def grown(pixels: Tensor, margins: Margins) -> Tensor:
    """Pixels [B, 3, H, W] on a larger canvas, whose margins repeat the pixels at the edge.

    The latents of the pixels that stay see their neighbourhood through the VAE, and an edge that goes on
    changes them least; with a strength below 1 the margins' colours also begin there.
    """
    return functional.pad(pixels, margins.order, mode="replicate")


class Mask(NamedTuple):
    """A mask in the run's size.

    Args:
        pixels: [B, 1, H, W] float32, 0 or 1.
        latents: [B, 1, h, w] float32, 0 or 1.
        alpha: Share of the painted image in the result, [B, 1, H, W]: `pixels` with a soft edge.
    """

    pixels: Tensor
    latents: Tensor
    alpha: Tensor


def make_mask(
    given: Pictures | None, height: int, width: int, factor: int, margins: Margins | None, blur: float
) -> Mask:
    """A mask of a run.

    Args:
        given: The caller's masks; None for the margins alone.
        height: Height of the canvas.
        width: Width of the canvas.
        factor: Pixels per latent along a side.
        margins: Margins by which the image grows, which are painted too.
        blur: Width in pixels of the soft edge, which lies outside of the mask.
    """
    grow = margins or Margins()
    inner = (height - grow.top - grow.bottom, width - grow.left - grow.right)
    own = torch.zeros(1, 1, *inner) if given is None else (given.at(*inner) >= 0.5).float()
    pixels = functional.pad(own, grow.order, value=1.0)
    small = functional.interpolate(functional.pad(own, grow.order), scale_factor=1 / factor, mode="nearest")
    if margins is not None:
        # a latent that holds a margin's pixel is painted whole, else a stripe of the canvas would stay
        border = functional.pad(torch.zeros(1, 1, *inner), grow.order, value=1.0)
        small = torch.maximum(small, functional.max_pool2d(border, factor))
    return Mask(pixels, small, softened(pixels, blur))


def softened(mask: Tensor, blur: float) -> Tensor:
    """A mask [B, 1, H, W] that falls from 1 at its edge to 0 about `blur` pixels outside of it.

    It is exactly 1 inside, and exactly 0 beyond that width.
    """
    reach = round(blur / 2)
    if blur <= 0:
        return mask
    reach = max(reach, 1)
    for kernel, pad in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        mask = functional.max_pool2d(mask, kernel, stride=1, padding=pad)
    for kernel, pad in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        mask = functional.avg_pool2d(mask, kernel, stride=1, padding=pad, count_include_pad=False)
    return mask
