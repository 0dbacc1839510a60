"""The arguments of one call of a pipeline: as given (`Request`), and after all checks (`Run`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.run import checks, edits, references
from zimage_core.run.batch import Batch, Encoding
from zimage_core.run.checks import MAX_IMAGES, StepCallback, real, whole
from zimage_core.sampling import noise, samplers
from zimage_core.sampling.schedule import BASE_SHIFT, MAX_STEPS, FlowMatchEulerScheduler
from zimage_core.text.prompt import DEFAULT_LENGTH, MAX_LENGTH

Member = TypeVar("Member")


@dataclass(frozen=True)
class Request:
    """The unchecked arguments of one call; `ZImagePipeline.__call__` describes them."""

    prompt: str | Sequence[str] | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float | None = None
    cfg_normalization: float | bool = False
    cfg_truncation: float | None = 1.0
    negative_prompt: str | Sequence[str] | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: torch.Tensor | None = None
    prompt_embeds: Sequence[Any] | None = None
    negative_prompt_embeds: Sequence[Any] | None = None
    output_type: str = "pil"
    joint_attention_kwargs: dict[str, Any] | None = None
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    max_sequence_length: int = DEFAULT_LENGTH
    seed: int | None = None
    cfg: float | None = None
    shift: float | None = None
    enable_thinking: bool = True
    prompt_template: str | None = None
    debug: bool = False
    sampler: str | None = None
    schedule: str | None = None
    variety: float = 0.0
    image: Any = None
    mask_image: Any = None
    strength: float | None = None
    mask_blur: float = 0.0
    outpaint: Sequence[int] | None = None
    control_image: Any = None
    controlnet_conditioning_scale: float | Sequence[float] = 0.75
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    reference_images: Any = None
    positions: str | None = None


@dataclass(frozen=True)
class Limits:
    """Limits and defaults of a pipeline, which follow from its components.

    Args:
        sample_size: Default height and width in pixels.
        stated_shift: Shift of the scheduler that the pipeline was made with; None if it was made without one.
        channels: Channels of a latent.
        caption_width: Width of a caption feature.
        factor: Pixels per latent along a side.
        patch: Latents per token along a side.
        rows: Most tokens from top to bottom.
        cols: Most tokens from left to right.
        vision: Width of the vision features that an Omni checkpoint takes; None for text alone.
    """

    sample_size: int
    stated_shift: float | None
    channels: int
    caption_width: int
    factor: int
    patch: int
    rows: int
    cols: int
    vision: int | None = None

    @classmethod
    def of(
        cls,
        net: TransformerConfig,
        vae: AutoencoderConfig | None,
        sample_size: int,
        stated_shift: float | None,
    ) -> Limits:
        """The limits of a transformer and a VAE; without a VAE those of FLUX.1's."""
        return cls(
            sample_size=sample_size,
            stated_shift=stated_shift,
            channels=net.in_channels,
            caption_width=net.cap_feat_dim,
            factor=(vae or AutoencoderConfig()).spatial_factor,
            patch=net.patch_size,
            rows=net.axes_lens[1],
            cols=net.axes_lens[2],
            vision=net.siglip_feat_dim,
        )

    def defaults(self, shift: float | None = None) -> Defaults:
        """Defaults of a call with this shift, which counts only where the pipeline states none.

        Where nothing states it, an Omni checkpoint counts as a base one: none that is distilled is known.
        """
        if self.stated_shift is not None:
            shift = self.stated_shift
        base = shift == BASE_SHIFT or (shift is None and self.vision is not None)
        return Defaults(50, 4.0, False) if base else Defaults(8, 0.0, True)

    @property
    def steps(self) -> int:
        """Default number of steps."""
        return self.defaults().steps

    @property
    def guidance(self) -> float:
        """Default guidance scale."""
        return self.defaults().guidance


class Defaults(NamedTuple):
    """Defaults of a kind of checkpoint.

    Args:
        steps: Number of steps.
        guidance: Guidance scale.
        distilled: Whether the checkpoint was trained to need no guidance.
    """

    steps: int
    guidance: float
    distilled: bool


@dataclass(frozen=True)
class Run:
    """The checked arguments of one call; `ZImagePipeline.__call__` describes those that are not listed.

    Args:
        latents: Starting noise [B, C, h, w] float32 on the CPU.
        seeds: The seed of each image; None if its noise was not drawn from a seed.
        sigmas: Noise levels, one more than steps.
        own_sigmas: Whether the caller gave the noise levels.
        shift: Shift of the noise levels.
        remarks: Warnings for the caller.
        sampler: Name of the method that follows the velocity.
        schedule: Name of the noise levels' grid.
        variety: How far each image's caption features are moved.
        later_seeds: The seed of each image for what is drawn after its starting noise; empty if nothing is.
        edit: What is made of a given image; None for text to image.
        controls: Control images with what follows them.
        references: Reference images of an Omni run; None for a run of text and image alone.
    """

    batch: Batch
    height: int
    width: int
    sigmas: tuple[float, ...]
    own_sigmas: bool
    shift: float
    guidance_scale: float
    cfg_normalization: float
    cfg_truncation: float | None
    seeds: tuple[int | None, ...]
    latents: torch.Tensor
    output_type: str
    callback: StepCallback | None
    callback_tensors: tuple[str, ...]
    encoding: Encoding
    debug: bool
    remarks: tuple[str, ...]
    sampler: str = "euler"
    schedule: str = "linear"
    variety: float = 0.0
    later_seeds: tuple[int, ...] = ()
    edit: Any = None
    controls: tuple[Any, ...] = ()
    references: Any = None

    @property
    def steps(self) -> int:
        """Number of steps: calls of the network for each image and side of guidance."""
        return len(self.sigmas) - 1


def prepare(limits: Limits, scheduler: FlowMatchEulerScheduler, request: Request) -> Run:
    """Check every argument of a call, then draw its noise.

    Args:
        limits: Limits and defaults of the pipeline.
        scheduler: The schedule of the noise levels.
        request: The arguments.

    Raises:
        BadArgument: The message names the argument, what was given and what is allowed.
    """
    if request.joint_attention_kwargs:
        raise Unsupported("joint_attention_kwargs: there are no attention processors here; leave it out")
    if request.shift is not None:
        scheduler = FlowMatchEulerScheduler(request.shift)
    usual = limits.defaults(request.shift)
    scale = checks.guidance(request.guidance_scale, request.cfg, usual.guidance)
    multiple = limits.factor * limits.patch
    batch = make_batch(request, scale > 0, limits.caption_width)
    given, size = edits.given(request, limits), (request.height, request.width)
    shown = references.given(request, limits, batch)
    if shown is not None:
        batch = references.batch_of(batch, shown)
    if shown is not None and given is None:
        size = references.size(shown, *size)
    if given is not None:
        size = given.size(*size, (multiple * limits.rows, multiple * limits.cols, checks.MAX_PIXELS))
    height, width = (
        checks.side(name, limits.sample_size if value is None else value, multiple, multiple * most)
        for name, value, most in zip(("height", "width"), size, (limits.rows, limits.cols), strict=True)
    )
    checks.area(height, width, 1)
    steps = usual.steps if request.num_inference_steps is None else request.num_inference_steps
    steps = whole("num_inference_steps", steps, 1, MAX_STEPS)
    sampler = checks.named("sampler", request.sampler, "euler", tuple(samplers.SAMPLERS))
    schedule = checks.named("schedule", request.schedule, "linear", samplers.SCHEDULES)
    sigmas = _levels(scheduler, schedule, steps, request)
    checks.area(height, width, batch.images)
    shape = (batch.images, limits.channels, height // limits.factor, width // limits.factor)
    seeds, latents, edit = _start(shape, request, given, len(sigmas) - 1)
    if edit is not None:
        sigmas = sigmas[edit.first :]
    variety = real("variety", request.variety, 0, checks.MAX_VARIETY)
    later = _later_seeds(seeds, request) if variety or samplers.SAMPLERS[sampler].stochastic else ()
    truncation, function = request.cfg_truncation, request.callback_on_step_end
    return Run(
        batch=batch,
        height=height,
        width=width,
        sigmas=sigmas,
        own_sigmas=request.sigmas is not None,
        shift=float(scheduler.shift),
        guidance_scale=scale,
        cfg_normalization=real("cfg_normalization", request.cfg_normalization, 0, 1e6),
        cfg_truncation=None if truncation is None else real("cfg_truncation", truncation, 0, 1e6),
        seeds=seeds,
        latents=latents,
        output_type=checks.choice("output_type", request.output_type, checks.OUTPUT_TYPES),
        callback=function,
        callback_tensors=checks.callback(function, request.callback_on_step_end_tensor_inputs),
        encoding=encoding(request),
        debug=bool(request.debug),
        sampler=sampler,
        schedule=schedule,
        variety=variety,
        later_seeds=later,
        remarks=(
            *_remarks(usual.distilled, scale, request),
            *(remark for each in (edit, shown) if each is not None for remark in each.remarks()),
        ),
        edit=edit,
        references=shown,
    )


def encoding(request: Request) -> Encoding:
    """Check the tokenisation options of a call, before any weight is used.

    Raises:
        BadArgument: max_sequence_length is no whole number in its range.
    """
    length = whole("max_sequence_length", request.max_sequence_length, 1, MAX_LENGTH)
    return Encoding(length, bool(request.enable_thinking), request.prompt_template)


def make_batch(request: Request, guided: bool, width: int) -> Batch:
    """Match prompts, negative prompts and embeddings one to one, and repeat them for several images each.

    Args:
        request: The arguments. `prompt_embeds` replace the prompts, `negative_prompt_embeds` the negative
            ones. One negative prompt may be used for all images; None means "".
        guided: Whether the negative side is needed.
        width: Width of the caption features.

    Raises:
        BadArgument, BadShape: A side is missing, has the wrong number of items, or an item is invalid.
    """
    times = whole("num_images_per_prompt", request.num_images_per_prompt, 1, MAX_IMAGES)
    if request.prompt is None and request.prompt_embeds is None:
        raise BadArgument("prompt: give prompt or prompt_embeds")
    texts = None if request.prompt is None else checks.prompts("prompt", request.prompt)
    omni = request.reference_images is not None
    positive = _embeds("prompt_embeds", request.prompt_embeds, width, omni)
    count = len(positive if positive is not None else texts or ())
    if texts is not None and len(texts) != count:
        raise BadArgument(f"prompt_embeds: got {count}, wanted {len(texts)}, one for each prompt")
    if count * times > MAX_IMAGES:
        raise BadArgument(
            f"num_images_per_prompt: {count * times} images in one call, wanted at most {MAX_IMAGES}"
        )

    given = request.negative_prompt
    negative_texts = None if given is None else checks.prompts("negative_prompt", given)
    negative = _embeds("negative_prompt_embeds", request.negative_prompt_embeds, width, omni)
    if not guided:
        negative_texts = negative = None
    elif negative is not None:
        negative_texts = None
    elif texts is None and negative_texts is None:
        raise BadArgument(
            "negative_prompt_embeds: needed for guidance when prompt_embeds come without prompt"
        )
    else:
        negative_texts = negative_texts or [""]
        negative_texts = negative_texts * count if len(negative_texts) == 1 else negative_texts
    for name, members in (("negative_prompt", negative_texts), ("negative_prompt_embeds", negative)):
        if members is not None and len(members) != count:
            raise BadArgument(f"{name}: got {len(members)}, wanted {count}, one for each prompt")
    return Batch(
        _repeated(texts, times),
        _repeated(negative_texts, times),
        _repeated(positive, times),
        _repeated(negative, times),
        count * times,
    )


def _embeds(name: str, value: Any, width: int, omni: bool) -> list[Any] | None:
    check: Callable[[str, Any, int], list[Any]] = checks.pieces if omni else checks.embeds
    return None if value is None else check(name, value, width)


def _repeated(members: list[Member] | None, times: int) -> list[Member] | None:
    return None if members is None else [member for member in members for _ in range(times)]


def _start(
    shape: tuple[int, int, int, int], request: Request, given: Any, steps: int
) -> tuple[tuple[int | None, ...], torch.Tensor, Any]:
    """Seeds and noise, from the seed, generator or latents of the request; and what edits its image."""
    seed, generator = checks.seed(request.seed, request.generator), request.generator
    latents, own = None, generator is None
    if request.latents is not None:
        if seed is not None:
            raise BadArgument("seed and latents both choose the noise: give one")
        latents = checks.latents(request.latents, shape)
    seeds: tuple[int | None, ...] = (None,) * shape[0]
    if generator is None:
        if latents is not None and given is None:
            return seeds, latents, None
        first = noise.fresh_seed() if seed is None else seed
        drawn = tuple((first + i) % (noise.MAX_SEED + 1) for i in range(shape[0]))
        generator = [torch.Generator().manual_seed(each) for each in drawn]
        seeds = drawn if latents is None else seeds
    if given is None:
        return seeds, noise.from_generator(shape, generator) if latents is None else latents, None
    edit = edits.make_edit(request, given, shape, generator, own, latents, steps)
    return seeds, edit.noise if latents is None else latents, edit


def _levels(
    scheduler: FlowMatchEulerScheduler, schedule: str, steps: int, request: Request
) -> tuple[float, ...]:
    """The noise levels of a schedule, or the caller's own."""
    if request.sigmas is not None:
        if request.schedule is not None:
            raise BadArgument("sigmas and schedule both choose the noise levels: give one")
        return scheduler.shifted(checks.levels(request.sigmas))
    if schedule == "linear":
        return scheduler.levels(steps)
    from zimage_core.sampling.schedules import levels

    return levels(schedule, scheduler, steps)


def _later_seeds(seeds: tuple[int | None, ...], request: Request) -> tuple[int, ...]:
    """Seeds of what is drawn after the starting noise: the images' own, where they have some."""
    known = tuple(seed for seed in seeds if seed is not None)
    return known or noise.drawn_seeds(len(seeds), request.generator)


def _remarks(distilled: bool, scale: float, request: Request) -> tuple[str, ...]:
    """Warnings about arguments that are allowed but probably a mistake."""
    remarks = []
    if distilled and scale > 0:
        meaning = ""
        if scale <= 1:
            meaning = f"; off is 0, and {scale:g} here is the {scale + 1:g} of programs that count from 1"
        remarks.append(
            f"guidance_scale={scale:g} runs the network twice a step and makes harsh, oversaturated "
            f"images, because this checkpoint was distilled to need no guidance{meaning}"
        )
    if scale == 0 and request.negative_prompt:
        remarks.append("negative_prompt has no effect at guidance_scale=0")
    if request.shift is not None and request.schedule in samplers.UNSHIFTED:
        remarks.append(f"shift has no effect on schedule={request.schedule!r}, which states noise levels")
    return tuple(remarks)
