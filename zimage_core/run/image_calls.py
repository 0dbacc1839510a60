"""Calls of the pipeline that begin from an image, by the name of what they do.

Each is a call with some arguments given; `ZImagePipeline.__call__` describes the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from zimage_core.errors import BadArgument
from zimage_core.run import checks
from zimage_core.run.request import Limits, Request, prepare
from zimage_core.run.result import Timings, ZImageResult
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

MAX_SCALE = 8.0


class ImageCalls:
    """`img2img`, `inpaint`, `outpaint` and `hires` of a pipeline."""

    scheduler: FlowMatchEulerScheduler

    @property
    def limits(self) -> Limits:
        """Limits of the components."""
        raise NotImplementedError

    def _run(self, request: Request, return_dict: bool) -> Any:
        raise NotImplementedError

    def _pixels(self, latents: torch.Tensor, output_type: str, debug: bool, edit: Any = None) -> Any:
        raise NotImplementedError

    def _fresh_seed(self) -> int:
        raise NotImplementedError

    def img2img(
        self,
        prompt: Any = None,
        image: Any = None,
        strength: float = 0.6,
        *,
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        """Paint an image anew, from its own colours and shapes.

        Args:
            prompt: One prompt or several.
            image: A path, a Pillow image, an array, a tensor, or a list of these; latents as well.
            strength: Share of the noise levels that it goes through: 0.3 keeps most, 0.8 little.
            return_dict: False returns (images,).
            call: Other arguments of a call.
        """
        needed(image=image)
        return self._run(Request(prompt=prompt, image=image, strength=strength, **call), return_dict)

    def inpaint(
        self,
        prompt: Any = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
        *,
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        """Paint a part of an image anew; the rest comes back as it was, to the bit.

        Args:
            prompt: What the whole image shows, in one prompt or several.
            image: The image, as for `img2img`.
            mask_image: White where to paint, black where not, in the same forms.
            strength: Share of the noise levels; 1 ignores what was under the mask.
            return_dict: False returns (images,).
            call: Other arguments of a call, such as `mask_blur`.
        """
        needed(image=image, mask_image=mask_image)
        request = Request(prompt=prompt, image=image, mask_image=mask_image, strength=strength, **call)
        return self._run(request, return_dict)

    def outpaint(
        self,
        prompt: Any = None,
        image: Any = None,
        margins: Sequence[int] | None = None,
        strength: float = 1.0,
        *,
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        """Paint around an image, which stays as it is.

        Args:
            prompt: What the whole image shows, in one prompt or several.
            image: The image, as for `img2img`.
            margins: Pixels to add at the left, top, right and bottom; what is missing to a multiple of 16 is
                added where the image grows.
            strength: Share of the noise levels.
            return_dict: False returns (images,).
            call: Other arguments of a call, such as `mask_blur`.
        """
        needed(image=image, margins=margins)
        request = Request(prompt=prompt, image=image, outpaint=margins, strength=strength, **call)
        return self._run(request, return_dict)

    def hires(
        self,
        prompt: Any = None,
        scale: float = 2.0,
        strength: float = 0.6,
        steps: int | None = None,
        *,
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        """Make an image, enlarge its latents, and paint the larger one anew from them.

        A model that was trained for one size composes well there; details come in the second pass.

        Args:
            prompt: One prompt or several.
            scale: Factor of each side; sides are rounded to multiples of 16.
            strength: Share of the noise levels of the second pass.
            steps: Steps of the second pass's whole schedule; default: as in the first.
            return_dict: False returns (images,).
            call: Other arguments of a call, for both passes; `height` and `width` are those of the first.

        Returns:
            The result of the second pass, or of the first if a callback ended it. Its settings and timings
            are those of both.
        """
        limits, scale = self.limits, checks.real("scale", scale, 1, MAX_SCALE)
        for name in ("image", "mask_image", "outpaint", "reference_images"):
            if call.get(name) is not None:
                raise BadArgument(f"hires: it makes its own image; leave {name} out")
        if all(call.get(name) is None for name in ("seed", "generator", "latents")):
            call["seed"] = self._fresh_seed()  # of both passes
        output_type = call.pop("output_type", "pil")
        first = Request(prompt=prompt, output_type="latent", **call)
        rows, columns = _enlarged_size(limits, first, scale)
        second = replace(
            first, height=None, width=None, strength=strength, latents=None, output_type=output_type
        )
        if steps is not None:
            second = replace(second, num_inference_steps=steps, sigmas=None)
        blank = torch.zeros(1, limits.channels, rows, columns)
        prepare(limits, self.scheduler, replace(second, image=blank, generator=None, seed=0))  # refuse it now
        small: ZImageResult = self._run(first, True)
        latents: Any = small.images
        if small.interrupted:
            pixels = latents if output_type == "latent" else self._pixels(latents, output_type, first.debug)
            result = replace(small, images=pixels)
        else:
            from zimage_core.editing.edit import enlarged

            large = self._run(replace(second, image=enlarged(latents, rows, columns)), True)
            result = _joined(small, large, scale)
        return result if return_dict else (result.images,)


def needed(**given: Any) -> None:
    """Refuse a call that lacks one of these arguments."""
    for name, value in given.items():
        if value is None:
            raise BadArgument(f"{name}: it is missing; give it, or call the pipeline for text to image")


def _enlarged_size(limits: Limits, request: Request, scale: float) -> tuple[int, int]:
    """Latents from top to bottom and from left to right of the second pass."""
    unit, sides = limits.factor * limits.patch, []
    for name, most in (("height", limits.rows), ("width", limits.cols)):
        value = getattr(request, name)
        value = limits.sample_size if value is None else value
        large = max(round(checks.side(name, value, unit, unit * most) * scale / unit), 1) * unit
        sides.append(checks.side(f"{name} of the enlarged image", large, unit, unit * most))
    checks.area(sides[0], sides[1], 1)
    return sides[0] // limits.factor, sides[1] // limits.factor


def _joined(small: ZImageResult, large: ZImageResult, scale: float) -> ZImageResult:
    """The second pass's result, with what belongs to both."""
    one, two = small.timings, large.timings
    timings = Timings(
        one.encode + two.encode, (*one.steps, *two.steps), one.decode + two.decode, one.total + two.total
    )
    both = zip(small.settings, large.settings, strict=True)
    settings = tuple(_of_both(before, after, scale) for before, after in both)
    return replace(large, timings=timings, settings=settings, seeds=small.seeds)


def _of_both(before: dict[str, Any], after: dict[str, Any], scale: float) -> dict[str, Any]:
    """Settings of an image that two passes made."""
    size = f"{before['width']}x{before['height']}"
    return {
        **after,
        "steps": before["steps"],
        "hires": scale,
        "hires_steps": after["steps"],
        "hires_from": size,
    }
