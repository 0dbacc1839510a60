"""diffusers' pipeline with reference images, as a name for code that calls it.

`ZImagePipeline` does the same with `reference_images=`, and takes more; `from_pipe` makes one of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from zimage_core.errors import BadArgument
from zimage_core.pipeline import ZImagePipeline
from zimage_core.run.checks import StepCallback, whole
from zimage_core.run.referenced import EDITING
from zimage_core.run.references import MOST
from zimage_core.run.request import Request
from zimage_core.run.result import ZImageResult

Self = TypeVar("Self", bound="ZImageOmniPipeline")


class ZImageOmniPipeline(ZImagePipeline):
    """Images from a prompt and reference images; the call is that of diffusers' class of this name.

    Without an image it runs the Omni stream all the same, as diffusers does. Its positions are not those of
    `ZImagePipeline`'s text to image, so that the two give different images of one seed.
    """

    def __call__(  # type: ignore[override]  # the order is that of diffusers
        self,
        image: Any = None,
        prompt: str | Sequence[str] | None = None,
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
        prompt_embeds: Sequence[Sequence[torch.Tensor]] | None = None,
        negative_prompt_embeds: Sequence[Sequence[torch.Tensor]] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        **more: Any,
    ) -> ZImageResult | tuple[Any]:
        """Make images; `ZImagePipeline.__call__` describes the arguments.

        Args:
            image: The reference images: one, a list for all prompts, or a list for each prompt.
            prompt: One prompt or several.
            height: Height in pixels; default: that of the last reference, else the checkpoint's own.
            width: Width in pixels, with the same default.
            num_inference_steps: Number of steps; default: the checkpoint's own, see docs/guides/omni.md.
            sigmas: Noise levels before the shift.
            guidance_scale: Guidance scale, with such a default (diffusers' is 5).
            cfg_normalization: Largest norm of the guided prediction.
            cfg_truncation: Guidance is off while 1 - sigma is above this.
            negative_prompt: Prompt to move away from; its side sees the same references.
            num_images_per_prompt: Images of each prompt.
            generator: One generator, or one per image.
            latents: Starting noise.
            prompt_embeds: Caption features instead of a prompt: for each a list of tensors [L, cap_feat_dim],
                one for each piece.
            negative_prompt_embeds: Caption features instead of a negative prompt, in the same form.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns (images,).
            joint_attention_kwargs: None or empty.
            callback_on_step_end: Called after each step.
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets.
            max_sequence_length: Most tokens of each piece of the prompt.
            more: Arguments of `ZImagePipeline` that diffusers has not, such as `seed` and `positions`, but
                for those of editing.

        Raises:
            BadArgument: An argument is outside its range; an empty list of images is one.
            Unsupported: The transformer or the pipeline has no vision branch.
        """
        _check_others(more)
        if isinstance(image, (list, tuple)) and not image:
            raise BadArgument("image: got an empty list; leave it out for text to image")
        request = Request(
            reference_images=() if image is None else image,
            prompt=prompt,
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

    @classmethod
    def from_default(cls: type[Self], *, omni: bool = True, **options: Any) -> Self:
        """`ZImagePipeline.from_default` with the embedded model's Omni sibling, unless `omni` is False."""
        return super().from_default(omni=omni, **options)

    def encode_prompt(  # type: ignore[override]  # the order and the lists are those of diffusers
        self,
        prompt: str | Sequence[str],
        device: str | torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Sequence[Sequence[torch.Tensor]] | None = None,
        negative_prompt_embeds: Sequence[Sequence[torch.Tensor]] | None = None,
        max_sequence_length: int = 512,
        num_condition_images: int = 0,
        enable_thinking: bool = True,
        debug: bool = False,
    ) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
        """Caption features of prompts in pieces, for `prompt_embeds` and `negative_prompt_embeds`.

        Args:
            prompt: One prompt or several.
            device: Device of the features; default: that of the transformer.
            do_classifier_free_guidance: Whether to return negative features.
            negative_prompt: One for all prompts, or one for each; None means the empty prompt.
            prompt_embeds: Features to return instead of encoding the prompts.
            negative_prompt_embeds: Features to return instead of encoding the negative prompts.
            max_sequence_length: Most tokens of each piece.
            num_condition_images: Number of reference images of each prompt.
            enable_thinking: False appends an empty <think> block to the prompt.
            debug: Check every block of the text encoder for NaN and infinity.

        Returns:
            Two lists; for each prompt a list of tensors [L, cap_feat_dim], one for each piece. The second is
            empty without guidance.
        """
        count = whole("num_condition_images", num_condition_images, 0, MOST)
        request = Request(
            reference_images=(),
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            enable_thinking=enable_thinking,
        )
        return self._encode_alone(request, do_classifier_free_guidance, device, debug, count)


def _check_others(more: Mapping[str, Any]) -> None:
    """Refuse further arguments of a call that have another meaning here, or none.

    Raises:
        BadArgument: It is one of editing, or the references' other name.
        TypeError: There is no such argument.
    """
    for name in more:
        if name == "reference_images":
            raise BadArgument("reference_images: here it is called image; give one of the two")
        if name in EDITING:
            raise BadArgument(
                f"{name}: here image is a reference; use ZImagePipeline, which takes reference_images= "
                "beside image="
            )
        if name not in Request.__dataclass_fields__:
            raise TypeError(f"ZImageOmniPipeline() got an unexpected keyword argument {name!r}")
