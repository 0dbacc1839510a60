"""diffusers' pipelines with a ControlNet, as names for code that calls them.

`ZImagePipeline` does the same with `load_controlnet` and `control_image=`, and takes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from zimage_core.control.inputs import SCALE, ControlImage
from zimage_core.control.load import ADVICE
from zimage_core.control.model import ControlNet
from zimage_core.errors import BadArgument, WrongModel
from zimage_core.pipeline import ZImagePipeline
from zimage_core.run.checks import StepCallback
from zimage_core.run.request import Request
from zimage_core.run.result import ZImageResult

Self = TypeVar("Self", bound="ZImageControlNetPipeline")


class ZImageControlNetPipeline(ZImagePipeline):
    """Text to image with one ControlNet; the call is that of diffusers' class of this name.

    Args:
        controlnet: The ControlNet, or its path; None to load one later.
        components: The components of `ZImagePipeline`.
    """

    def __init__(self, *args: Any, controlnet: Any = None, **components: Any) -> None:
        super().__init__(*args, **components)
        if controlnet is not None:
            self.load_controlnet(controlnet)

    @property
    def controlnet(self) -> ControlNet | None:
        """The first of the loaded ControlNets."""
        return next(iter(self._controlnets.values()), None)

    @classmethod
    def from_pretrained(cls: type[Self], *args: Any, controlnet: Any = None, **options: Any) -> Self:
        """`ZImagePipeline.from_pretrained` with a ControlNet, an object or a path."""
        pipe = super().from_pretrained(*args, **options)
        if controlnet is not None:
            pipe.load_controlnet(controlnet)
        return pipe

    @classmethod
    def from_pipe(cls: type[Self], pipeline: Any, **changes: Any) -> Self:
        """A second pipeline that shares the components and the ControlNets of a first one."""
        controlnet = changes.pop("controlnet", None)
        pipe = super().from_pipe(pipeline, **changes)
        for name, net in ({} if controlnet is not None else pipeline.controlnets).items():
            pipe.load_controlnet(net, name, hints=net.hints)
        if controlnet is not None:
            pipe.load_controlnet(controlnet)
        return pipe

    def __call__(  # type: ignore[override]  # the order is that of diffusers
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = SCALE,
        cfg_normalization: float | bool = False,
        cfg_truncation: float | None = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: Sequence[torch.Tensor] | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        **others: Any,
    ) -> ZImageResult | tuple[Any]:
        """Make images that follow a control image.

        Arguments are those of `ZImagePipeline.__call__`, whose further ones `others` may have. A list of
        control images is one for each prompt, as in diffusers, where there is one ControlNet.
        """
        if control_image is None:
            raise BadArgument("control_image: this pipeline follows one; give it, or use ZImagePipeline")
        request = Request(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            control_image=self._single(control_image),
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            joint_attention_kwargs=joint_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            **others,
        )
        return self._run(request, return_dict)

    def _single(self, control_image: Any) -> Any:
        """The argument as that of `ZImagePipeline`: with one ControlNet a list is a batch."""
        plain = not isinstance(control_image, (ControlImage, dict))
        return ControlImage(control_image) if plain and len(self._controlnets) == 1 else control_image


class ZImageControlNetInpaintPipeline(ZImageControlNetPipeline):
    """Inpainting by a ControlNet of 2.x alone; the call is that of diffusers' class of this name.

    The net sees the masked image, and the run begins from noise. What lies outside of the mask is therefore
    painted anew, close to the image; `ZImagePipeline` with `mask_image=` leaves it untouched.
    """

    def load_controlnet(self, controlnet: Any, *args: Any, **options: Any) -> ControlNet:
        """`ZImagePipeline.load_controlnet`; WrongModel for a ControlNet without channels for a mask."""
        before = dict(self._controlnets)
        net = super().load_controlnet(controlnet, *args, **options)
        if not net.config.masked:
            self._controlnets = before
            fault = f"this ControlNet ({net.config.variant}) has no channels for a mask"
            raise WrongModel(net.name, fault, ADVICE)
        return net

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = SCALE,
        **others: Any,
    ) -> ZImageResult | tuple[Any]:
        """Paint the white part of `mask_image` anew.

        Args:
            prompt: As in `ZImageControlNetPipeline`, like all that are not listed.
            height: Height in pixels.
            width: Width in pixels.
            num_inference_steps: Calls of the network.
            sigmas: Noise levels before the shift.
            guidance_scale: Guidance scale.
            image: The image to be inpainted.
            mask_image: Where to paint: white.
            control_image: What steers the run; None for nothing but the image, as the trainer allows.
            controlnet_conditioning_scale: Factor of the hints.
            others: Further arguments of `ZImageControlNetPipeline`, by name.
        """
        if image is None or mask_image is None:
            raise BadArgument("image and mask_image: this pipeline inpaints; give both")
        return super().__call__(
            prompt, height, width, num_inference_steps, sigmas, guidance_scale,
            ControlImage(control_image, image, mask_image), controlnet_conditioning_scale, **others,
        )  # fmt: skip
