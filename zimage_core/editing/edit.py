"""A run that begins from an image: its canvas, the latents it starts from, and what stays of it.

As in diffusers' Z-Image pipelines for image to image and inpainting: of N steps the last
min(N * strength, N) run, rounded up. They start from the image's latents with the noise of the first of these
levels. With a mask, the latents outside of it are set back after each step, to the image's latents with the
noise of the next level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.editing.images import Pictures, expand, open_images
from zimage_core.editing.mask import Margins, Mask, grown, make_mask
from zimage_core.errors import BadArgument, BadShape
from zimage_core.sampling import noise

STRENGTH, MASKED_STRENGTH = 0.6, 1.0
"""Defaults of the strength: without and with a mask or margins, as in diffusers."""

LARGE = 2048 * 2048
"""Pixels of the largest images that Z-Image is meant for; a photograph is often larger."""
DISTORTED = 1.02
"""A change of width over height by more than this factor is warned of."""

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [B, 3, H, W] in [-1, 1] -> mean and log-variance of their latents [B, C, h, w] on the CPU."""


def first_step(steps: int, strength: float) -> int:
    """Number of the steps that a strength leaves out, with the arithmetic of diffusers."""
    return int(max(steps - min(steps * strength, steps), 0))


@dataclass(frozen=True)
class Given:
    """What a call gives to begin from, opened and checked, in the sizes that it has.

    Args:
        image: The images; None if `latents` are given.
        latents: Clean latents [B, C, h, w] of the transformer instead of images.
        mask: The masks.
        outpaint: Margins that the caller asked for.
        factor: Pixels per latent along a side.
        multiple: Pixels per token along a side.
    """

    image: Pictures | None
    latents: Tensor | None
    mask: Pictures | None
    outpaint: Margins | None
    factor: int
    multiple: int

    @classmethod
    def open(
        cls, image: Any, mask: Any, outpaint: Sequence[int] | None, channels: int, factor: int, multiple: int
    ) -> Given:
        """Read and check the arguments `image`, `mask_image` and `outpaint` of a call.

        Args:
            image: What `open_images` takes, or latents [B, C, h, w] as `output_type="latent"` gives them.
            mask: What `open_images` takes, or None.
            outpaint: Four numbers of pixels, or None.
            channels: Channels of a latent.
            factor: Pixels per latent along a side.
            multiple: Pixels per token along a side.

        Raises:
            BadArgument, BadShape, BadFile: An argument cannot be used, or they do not fit each other.
        """
        margins = None
        if outpaint is not None:
            margins = Margins(*outpaint)
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels:
            if mask is not None or margins is not None:
                raise BadArgument("mask_image and outpaint need pixels, not latents: give an image")
            patch = multiple // factor
            if not image.is_floating_point() or not bool(torch.isfinite(image).all()):
                raise BadArgument("image: wanted latents of finite floats")
            if len(image) < 1 or min(image.shape[2:]) < 1 or image.shape[2] % patch or image.shape[3] % patch:
                raise BadShape(
                    f"image: got latents of {tuple(image.shape)}, wanted [B, {channels}, h, w] with h and w "
                    f"multiples of {patch}"
                )
            latents = image.detach().to("cpu", torch.float32, copy=True)
            return cls(None, latents, None, None, factor, multiple)
        opened = open_images(image, "image")
        masks = None if mask is None else open_images(mask, "mask_image", gray=True)
        return cls(opened, None, masks, margins, factor, multiple)

    @property
    def masked(self) -> bool:
        """Whether a part of the image stays as it is."""
        return self.mask is not None or self.outpaint is not None

    def margins(self) -> Margins | None:
        """Margins that the image grows by, so that its sides become multiples; None if it does not grow."""
        if self.outpaint is None or self.image is None:
            return None
        return self.outpaint.rounded(*self.image.size, self.multiple)

    def size(self, height: int | None, width: int | None, most: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width of the run.

        They are the caller's, else those of the image, each rounded down to a multiple as in diffusers. An
        image beyond the limits is made smaller in proportion.

        Args:
            height: The caller's height.
            width: The caller's width.
            most: Most pixels of height, of width, and of their product.
        """
        fixed = self._fixed()
        if fixed is not None:
            if height not in (None, fixed[0]) or width not in (None, fixed[1]):
                what = "latents" if self.image is None else "image and outpaint"
                raise BadArgument(
                    f"height and width: {what} say {fixed[1]} x {fixed[0]} pixels already; leave them out"
                )
            return fixed
        own = (1, 1) if self.image is None else self.image.size
        scale = min(1.0, most[0] / own[0], most[1] / own[1], sqrt(most[2] / (own[0] * own[1])))
        high, wide = (max(int(side * scale) // self.multiple, 1) * self.multiple for side in own)
        return high if height is None else height, wide if width is None else width

    def _fixed(self) -> tuple[int, int] | None:
        """Height and width where the call has no choice."""
        if self.latents is not None:
            return self.latents.shape[2] * self.factor, self.latents.shape[3] * self.factor
        grow = self.margins()
        if grow is None or self.image is None:
            return None
        height, width = self.image.size
        return grow.top + height + grow.bottom, grow.left + width + grow.right

    def __len__(self) -> int:
        if self.latents is not None:
            return len(self.latents)
        return 1 if self.image is None else len(self.image)


@dataclass(frozen=True)
class Edit:
    """What is made of the given image in one run.

    Args:
        given: What the call gave.
        strength: Share of the noise levels.
        steps: Steps of the whole schedule, of which the last ones run.
        blur: Width of the mask's soft edge.
        images: Images of the run, B.
        canvas: The images in the run's size, [B', 3, H, W] in [0, 1], where B' divides B.
        mask: The mask in the run's size; None for all.
        noise: Noise that latents are noised with, [B, C, h, w].
        drawn: Noise of the sample from the VAE's posterior, [B, ...] or [B', ...]; None without an encoding.
        started: Whether the caller gave the latents to start from.
        clean: Latents of the image [B, C, h, w], known once it is encoded.
    """

    given: Given
    strength: float
    steps: int
    blur: float
    images: int
    canvas: Tensor | None
    mask: Mask | None
    noise: Tensor
    drawn: Tensor | None
    started: bool
    clean: Tensor | None = field(default=None, repr=False)

    @property
    def first(self) -> int:
        """Number of the steps that the strength leaves out."""
        return first_step(self.steps, self.strength)

    @property
    def encodes(self) -> bool:
        """Whether the image has to go through the VAE's encoder."""
        return self.drawn is not None

    def encoded(self, moments: Moments, scaling: float, shift: float) -> Edit:
        """The same edit, with the latents of its image: a sample of the VAE's posterior, as in diffusers."""
        if self.drawn is None or self.canvas is None:
            return self
        # where each image of the run has its own sample, there are more of them than images given
        mean, logvar = (expand(each, len(self.drawn), "image") for each in moments(2.0 * self.canvas - 1.0))
        clean = (mean + torch.exp(0.5 * logvar) * self.drawn - shift) * scaling
        return replace(self, clean=expand(clean, self.images, "image"))

    def start(self, latents: Tensor, sigma: float) -> Tensor:
        """Latents at the first noise level, from the run's noise, or as the caller gave them."""
        return latents if self.started or self.clean is None else self._noised(self.clean, sigma)

    def after_step(self, latents: Tensor, sigma: float) -> Tensor:
        """Latents after a step that ended at a noise level: outside of the mask those of the image."""
        if self.mask is None or self.clean is None:
            return latents
        known = (self._noised(self.clean, sigma) if sigma else self.clean).to(latents)
        mask = expand(self.mask.latents, self.images, "mask_image").to(latents)
        return (1 - mask) * known + mask * latents

    def finished(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] with those of the image pasted outside of the mask."""
        if self.mask is None or self.canvas is None:
            return pixels
        alpha = expand(self.mask.alpha, self.images, "mask_image")
        canvas = expand(self.canvas, self.images, "image")
        return alpha * pixels + (1 - alpha) * canvas

    def settings(self, index: int) -> dict[str, Any]:
        """What the settings of an image say: never a path."""
        out: dict[str, Any] = {"steps": self.steps, "strength": self.strength}
        for name, pictures in (("image", self.given.image), ("mask", self.given.mask)):
            if pictures is not None:
                hashes = pictures.sha256
                own = index // (self.images // len(pictures))
                out[f"{name}_sha256"] = hashes[own] if len(hashes) == len(pictures) else hashes[0]
        if self.given.outpaint is not None:
            out["outpaint"] = list(self.given.outpaint)
        return {**out, "mask_blur": self.blur} if self.blur else out

    def remarks(self) -> list[str]:
        """Warnings about what is allowed but probably a mistake."""
        found, given = [], self.given
        if self.mask is None and self.strength == 1 and not self.started:
            found.append("strength=1 without a mask starts from noise alone, so that the image has no effect")
        if given.image is not None and given.mask is not None and given.mask.size != given.image.size:
            (mask_h, mask_w), (h, w) = given.mask.size, given.image.size
            found.append(f"mask_image is {mask_w} x {mask_h} pixels and was resized to fit image, {w} x {h}")
        found += self._resized()
        if self.canvas is not None and self.canvas.shape[2] * self.canvas.shape[3] > LARGE:
            high, wide = self.canvas.shape[2:]
            found.append(
                f"image makes a run of {wide} x {high} pixels; Z-Image is meant for 2048 x 2048 at most, and "
                "the time grows with the square of the pixels; make it smaller, or give height= and width="
            )
        if self.mask is not None and not bool(self.mask.pixels.any()):
            found.append("mask_image is black everywhere, so that the image stays as it is")
        if self.mask is not None and bool(self.mask.pixels.all()):
            found.append("mask_image is white everywhere, so that nothing of the image is kept")
        return found

    def _resized(self) -> list[str]:
        """A warning about the first image whose resize loses pixels that should stay, or its shape."""
        image, canvas = self.given.image, self.canvas
        if image is None or canvas is None:
            return []
        high, wide = image.size if self.given.outpaint is not None else canvas.shape[2:]
        for h, w in image.sizes:
            stretch = (h * wide) / (w * high)
            size = f"{wide} x {high}"
            what = f"image is {w} x {h} pixels and was resized to {size}"
            if self.mask is not None and (h, w) != (high, wide):
                return [f"{what}, so that its pixels do not stay to the bit; give an image of {size}"]
            if self.mask is None and max(stretch, 1 / stretch) > DISTORTED:
                return [f"{what}, which stretches it; crop it to that shape"]
        return []

    def _noised(self, clean: Tensor, sigma: float) -> Tensor:
        """(1 - sigma) clean + sigma noise, in float32 as diffusers' scheduler computes it."""
        level = torch.tensor(sigma, dtype=torch.float32)
        return level * self.noise + (1.0 - level) * clean


def make_edit(
    given: Given,
    shape: tuple[int, int, int, int],
    generator: Any,
    own: bool,
    latents: Tensor | None,
    strength: float,
    steps: int,
    blur: float,
) -> Edit:
    """Draw the noise of a run that begins from an image, in the order of diffusers: posterior, then start.

    Args:
        given: What the call gave.
        shape: Shape of the latents [B, C, h, w].
        generator: One generator, or one per image.
        own: Whether each image of the run has its own generator, and draws its own sample of the posterior.
        latents: The caller's latents to start from; then noise is drawn first, as in diffusers.
        strength: Share of the noise levels.
        steps: Steps of the whole schedule.
        blur: Width of the mask's soft edge in pixels.

    Raises:
        BadArgument: The numbers of images, masks and generators do not fit each other.
    """
    images = shape[0]
    height, width = shape[2] * given.factor, shape[3] * given.factor
    for name, pictures in (("image", given), ("mask_image", given.mask)):
        if pictures is not None:
            expand(torch.empty(len(pictures)), images, name)
    canvas, mask, margins = None, None, given.margins()
    if given.image is not None:
        if margins is None:
            canvas = given.image.at(height, width)
        else:
            canvas = grown(given.image.at(*given.image.size), margins)
    if given.masked:
        mask = make_mask(given.mask, height, width, given.factor, margins, blur)
    encodes = canvas is not None and (latents is None or mask is not None)
    several = isinstance(generator, (list, tuple)) and len(generator) > 1
    count = images if own else len(given)

    def posterior() -> Tensor | None:
        if not encodes:
            return None
        mine = generator[:count] if several else generator
        return noise.from_generator((count, *shape[1:]), mine)

    if latents is not None:
        drawn_noise = noise.from_generator(shape, generator) if mask is not None else latents
        drawn = posterior()
    else:
        drawn = posterior()
        drawn_noise = noise.from_generator(shape, generator)
    clean = None if given.latents is None else expand(given.latents, images, "image")
    return Edit(
        given, strength, steps, blur, images, canvas, mask, drawn_noise, drawn, latents is not None, clean
    )


def enlarged(latents: Tensor, height: int, width: int) -> Tensor:
    """Latents [B, C, h, w] -> [B, C, height, width], bicubic."""
    return functional.interpolate(latents, size=(height, width), mode="bicubic")
