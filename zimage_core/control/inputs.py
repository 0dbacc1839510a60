"""Control images of a call: read and checked before any weight is used, then encoded to control latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimage_core.config import TransformerConfig
from zimage_core.control.apply import Control
from zimage_core.control.load import ADVICE
from zimage_core.control.model import ControlNet
from zimage_core.editing.images import Pictures, expand, open_images
from zimage_core.errors import BadArgument, WrongModel, printable

SCALE = 0.75
"""Default scale, that of diffusers; the trainer recommends 0.65 to 0.90."""
MOST_SCALE = 10.0
DISTORTED = 1.02
"""Ratio of the sides' ratios from which on a resized control image is remarked."""

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [B, 3, H, W] in [-1, 1] -> mean and log-variance of their latents [B, C, h, w] on the CPU."""


@dataclass(frozen=True, eq=False)
class ControlImage:
    """A control image with an image to be inpainted, for ControlNets that have channels for it (2.x).

    Args:
        image: What steers the run, in any form of `control_image`; None for nothing but the inpainting.
        init: Image to be inpainted, in the same forms.
        mask: Where to paint anew: white.
    """

    image: Any = None
    init: Any = None
    mask: Any = None


@dataclass(frozen=True, eq=False)
class Wanted:
    """One control image of a run, opened and checked.

    Args:
        net: The ControlNet that follows it.
        image: The control image; None for zeros.
        init: Image to be inpainted; None without.
        mask: Mask of that; None without.
        scale: Factor of the hints.
        start, end: Shares of the steps between which it acts.
        steps: First step in which it acts, and the first in which it does no more.
    """

    net: ControlNet
    image: Pictures | None
    init: Pictures | None
    mask: Pictures | None
    scale: float
    start: float
    end: float
    steps: tuple[int, int]

    def encoded(
        self, moments: Moments, scaling: float, shift: float, height: int, width: int, images: int
    ) -> Control:
        """The control with its latents: modes of the VAE's posterior, as in training.

        Args:
            moments: The VAE's encoder.
            scaling: Factor of its latents.
            shift: What is subtracted before.
            height: Height of the run's images in pixels.
            width: Width in pixels.
            images: Images of the run.
        """

        def latents_of(pixels: Tensor) -> Tensor:
            return (moments(pixels)[0] - shift) * scaling

        parts: list[Tensor] = []
        if self.image is not None:
            parts.append(latents_of(2.0 * self.image.at(height, width) - 1.0))
        if self.init is not None and self.mask is not None:
            mask = (self.mask.at(height, width) >= 0.5).float()
            init = 2.0 * self.init.at(height, width) - 1.0
            count = max(len(mask), len(init))
            mask, init = expand(mask, count, "mask_image"), expand(init, count, "image")
            masked = latents_of(init * (mask < 0.5))
            kept = torch.nn.functional.interpolate(1 - mask, size=masked.shape[-2:], mode="nearest")
            parts = parts or [torch.zeros_like(masked)]
            parts += [kept, masked]
        count = max(len(part) for part in parts)
        latents = torch.cat([expand(part, count, "control_image") for part in parts], dim=1)
        missing = self.net.config.channels - latents.shape[1]
        latents = torch.cat((latents, latents.new_zeros(count, missing, *latents.shape[2:])), dim=1)
        if count > 1:
            latents = expand(latents, images, "control_image")
        return Control(self.net, latents, self.scale, self.steps, self.net.hints, self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What an image's settings say of it."""
        found: dict[str, Any] = {"controlnet": self.net.name, "scale": self.scale}
        if (self.start, self.end) != (0.0, 1.0):
            found |= {"start": self.start, "end": self.end}
        if self.net.hints != "trainer":
            found["hints"] = self.net.hints
        for name in ("image", "init", "mask"):
            pictures: Pictures | None = getattr(self, name)
            if pictures is not None:
                hashes = pictures.sha256
                found[f"{name}_sha256"] = hashes[0] if len(hashes) == 1 else list(hashes)
        return found


def read_controls(
    images: Any,
    nets: Mapping[str, ControlNet],
    scales: Any,
    starts: Any,
    ends: Any,
    steps: int,
    images_of_run: int,
    inpainted: tuple[Any, Any] | None = None,
) -> tuple[Wanted, ...]:
    """Check the control arguments of a call.

    Args:
        images: One control image, several, or name of a ControlNet -> one or several. Each is what
            `editing.images.open_images` takes, or a `ControlImage`.
        nets: The ControlNets by name. One follows all images; several follow one each, in their order.
        scales: `controlnet_conditioning_scale`: one number, or one for each image.
        starts: `control_guidance_start`, in the same form.
        ends: `control_guidance_end`, in the same form.
        steps: Steps of the run.
        images_of_run: Images of the run.
        inpainted: Image and mask of a call that inpaints, which nets with channels for them see as well.

    Raises:
        BadArgument, BadShape, BadFile: An argument cannot be used; nothing was computed.
    """
    pairs = _pairs(images, nets)
    count = len(pairs)
    rows = zip(
        pairs,
        _numbers("controlnet_conditioning_scale", scales, count, -MOST_SCALE, MOST_SCALE),
        _numbers("control_guidance_start", starts, count, 0.0, 1.0),
        _numbers("control_guidance_end", ends, count, 0.0, 1.0),
        strict=True,
    )
    found = []
    for i, ((net, given), scale, start, end) in enumerate(rows):
        where = "control_image" if count == 1 else f"control_image[{i}]"
        if start >= end:
            raise BadArgument(
                f"control_guidance_start: got {start:g} and control_guidance_end {end:g}, wanted start < end"
            )
        given = given if isinstance(given, ControlImage) else ControlImage(given)
        if inpainted is not None and given.init is None and net.config.masked:
            given = ControlImage(given.image, *inpainted)
        image, init, mask = _opened(given, net, where)
        numbers = [len(each) for each in (image, init, mask) if each is not None]
        for number in numbers:
            if images_of_run % number or max(numbers) % number:
                raise BadArgument(
                    f"{where}: got {' and '.join(map(str, numbers))} for a run of {images_of_run} images, "
                    "wanted one, or a number that divides it and the others"
                )
        found.append(Wanted(net, image, init, mask, scale, start, end, steps_between(start, end, steps)))
    return tuple(found)


def steps_between(start: float, end: float, steps: int) -> tuple[int, int]:
    """First step that begins at or after `start` and the first that ends after `end`, as in diffusers."""
    acting = [i for i in range(steps) if i / steps >= start and (i + 1) / steps <= end]
    return (acting[0], acting[-1] + 1) if acting else (0, 0)


def check_fits(net: ControlNet, base: TransformerConfig) -> None:
    """Refuse a ControlNet that was made for another transformer.

    Raises:
        WrongModel: Its width, heads, channels or layers are not those of the transformer.
    """
    own, path = net.config, getattr(net.opened, "name", None) or net.name or "ControlNet"
    latents = base.in_channels
    for what, has, wanted in (
        ("width", own.dim, (base.dim,)),
        ("heads", own.n_heads, (base.n_heads,)),
        ("control channels", own.channels, (latents, 2 * latents + 1)),
    ):
        if has not in wanted:
            needs = " or ".join(map(str, wanted))
            fault = f"this ControlNet has {what} {has}, this transformer needs {needs}"
            raise WrongModel(path, fault, "get the ControlNet that was made for this transformer")
    own.places_in(base.n_layers)


def remarks_on(controls: Sequence[Wanted], height: int, width: int) -> list[str]:
    """Warnings about control images that are allowed but probably a mistake."""
    found = []
    for each in controls:
        if each.steps[0] == each.steps[1]:
            found.append(
                f"control_guidance_start={each.start:g} and control_guidance_end={each.end:g} leave no step"
            )
        if each.image is not None:
            high, wide = each.image.size
            ratio = (high * width) / (wide * height)
            if max(ratio, 1 / ratio) > DISTORTED:
                found.append(
                    f"control_image: {wide} x {high} pixels are stretched to {width} x {height}; crop it, or "
                    "give width= and height= of its shape"
                )
    return found


def _pairs(images: Any, nets: Mapping[str, ControlNet]) -> list[tuple[ControlNet, Any]]:
    """Each image with the net that follows it."""
    if not nets:
        raise BadArgument("control_image: no ControlNet is loaded; call pipe.load_controlnet(path) first")
    if isinstance(images, Mapping):
        unknown = [name for name in images if name not in nets]
        if unknown or not images:
            shown = printable(unknown[0], 60) if unknown else "an empty dict"
            raise BadArgument(f"control_image: got {shown!r}, wanted names of {', '.join(nets)}")
        return [(nets[name], each) for name, value in images.items() for each in _listed(value)]
    given = _listed(images)
    if not given:
        raise BadArgument("control_image: got an empty list, wanted at least one image")
    if len(nets) == 1:
        return [(next(iter(nets.values())), each) for each in given]
    if len(nets) != len(given):
        raise BadArgument(
            f"control_image: got {len(given)} for {len(nets)} ControlNets ({', '.join(nets)}), wanted one "
            "for each, or a dict of name -> image"
        )
    return list(zip(nets.values(), given, strict=True))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _numbers(name: str, value: Any, count: int, low: float, high: float) -> list[float]:
    """One number for each image."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise BadArgument(f"{name}: got {len(values)} numbers, wanted one, or {count}: one for each image")
    for each in values:
        fine = isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each)
        if not fine or not low <= each <= high:
            shown = printable(repr(each), 60)
            raise BadArgument(f"{name}: got {shown}, wanted a number from {low:g} to {high:g}")
    return [float(each) for each in values]


def _opened(
    given: ControlImage, net: ControlNet, where: str
) -> tuple[Pictures | None, Pictures | None, Pictures | None]:
    if given.image is None and given.init is None:
        raise BadArgument(f"{where}: got None, wanted an image")
    if (given.init is None) != (given.mask is None):
        raise BadArgument(f"{where}: an image to inpaint and its mask go together; give init and mask")
    if given.init is not None and not net.config.masked:
        raise BadArgument(
            f"{where}: the ControlNet {printable(net.name, 60)!r} ({net.config.variant}) has no channels "
            f"for a mask; {ADVICE}"
        )
    image = None if given.image is None else open_images(given.image, where)
    if given.init is None:
        return image, None, None
    return image, open_images(given.init, "image"), open_images(given.mask, "mask_image", gray=True)
