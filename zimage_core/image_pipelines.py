"""Pipelines with the names and the call arguments of diffusers' for image to image and inpainting.

They differ from `ZImagePipeline` in their call alone; `from_pipe` makes one of another and shares its
networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zimage_core.pipeline import ZImagePipeline
from zimage_core.run.checks import StepCallback
from zimage_core.run.image_calls import needed
from zimage_core.run.request import Request
from zimage_core.run.result import ZImageResult


class ZImageImg2ImgPipeline(ZImagePipeline):
    """Image to image, with the call of diffusers' ZImageImg2ImgPipeline."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.6,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
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
        **more: Any,
    ) -> ZImageResult | tuple[Any]:
        """Paint an image anew; `ZImagePipeline.__call__` describes the arguments.

        `more` are those that diffusers has not, such as `seed`.
        """
        needed(image=image)
        request = Request(
            prompt=prompt,
            image=image,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
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
            **more,
        )
        return self._run(request, return_dict)


class ZImageInpaintPipeline(ZImagePipeline):
    """Inpainting, with the call of diffusers' ZImageInpaintPipeline.

    Pixels outside of the mask are pasted from the image; diffusers gives them as the VAE makes them.
    """

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: torch.Tensor | None = None,
        strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
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
        **more: Any,
    ) -> ZImageResult | tuple[Any]:
        """Paint a part of an image anew; `ZImagePipeline.__call__` describes the arguments.

        `masked_image_latents` have no effect, as in diffusers: the network does not see them. `more` are
        arguments that diffusers has not, such as `seed` and `mask_blur`.
        """
        needed(image=image, mask_image=mask_image)
        request = Request(
            prompt=prompt,
            image=image,
            mask_image=mask_image,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
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
            **more,
        )
        return self._run(request, return_dict)
