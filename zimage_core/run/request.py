"""One run of a pipeline, with all of its arguments checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zimage_core import __version__
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.run import checks
from zimage_core.run.batch import Batch, make_batch
from zimage_core.run.checks import StepCallback, embeds, whole
from zimage_core.sampling import noise
from zimage_core.sampling.guidance import Guided
from zimage_core.sampling.schedule import MAX_STEPS, FlowMatchEulerScheduler
from zimage_core.text.prompt import DEFAULT_LENGTH, MAX_LENGTH

MOST_SIGMAS = 100
"""A longer list of own noise levels is left out of a picture's settings."""
DEFAULT_ENCODING = {"max_sequence_length": DEFAULT_LENGTH, "enable_thinking": True, "template": None}


@dataclass(frozen=True)
class Limits:
    """What the parts of a pipeline allow and what suits them.

    Args:
        sample_size: Default height and width in pixels.
        steps: Default number of steps.
        guidance: Default guidance scale.
        distilled: The checkpoint was trained to need no guidance.
        channels: Of a latent.
        caption_width: Of a caption feature.
        factor: Pixels per latent along a side.
        patch: Latents per token along a side.
        rows: Most tokens from top to bottom.
        cols: Most tokens from left to right.
    """

    sample_size: int
    steps: int
    guidance: float
    distilled: bool
    channels: int
    caption_width: int
    factor: int
    patch: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Run:
    """The checked arguments of one call; see `ZImagePipeline.__call__` for their meaning.

    Args:
        latents: Starting noise [B, C, h, w] float32 on the CPU.
        seeds: Of each picture; None where the noise came from elsewhere.
        sigmas: Noise levels, one more than steps.
        encoding: Options of `text.prompt.prompt_ids`.
    """

    batch: Batch
    height: int
    width: int
    sigmas: tuple[float, ...]
    own_sigmas: bool
    scale: float
    cfg_normalization: float
    cfg_truncation: float | None
    seeds: tuple[int | None, ...]
    latents: torch.Tensor
    output_type: str
    callback: StepCallback | None
    callback_tensors: tuple[str, ...]
    encoding: dict[str, Any]
    debug: bool

    @property
    def steps(self) -> int:
        """Calls of the network per picture and side."""
        return len(self.sigmas) - 1


def prepare(limits: Limits, scheduler: FlowMatchEulerScheduler, given: Mapping[str, Any]) -> Run:
    """Check every argument of a call, then draw its noise.

    Args:
        limits: Of the pipeline.
        scheduler: Makes the noise levels.
        given: Argument name of `ZImagePipeline.__call__` -> value.

    Raises:
        BadArgument: Names the argument, what was given and what is allowed.
    """
    if given["joint_attention_kwargs"]:
        raise Unsupported("joint_attention_kwargs: there are no attention processors here; leave it out")
    scale = checks.guidance(given["guidance_scale"], given["cfg"], limits.guidance)
    multiple = limits.factor * limits.patch
    sides = (("height", limits.rows), ("width", limits.cols))
    height, width = (
        checks.side(
            name, limits.sample_size if given[name] is None else given[name], multiple, multiple * most
        )
        for name, most in sides
    )
    checks.area(height, width, 1)
    own_sigmas = given["sigmas"] is not None
    steps = limits.steps if given["num_inference_steps"] is None else given["num_inference_steps"]
    steps = whole("num_inference_steps", steps, 1, MAX_STEPS)
    sigmas = scheduler.shifted(checks.levels(given["sigmas"])) if own_sigmas else scheduler.sigmas(steps)
    batch = make_batch(given, given["num_images_per_prompt"], scale > 0, limits.caption_width)
    checks.area(height, width, batch.images)
    run = {
        "cfg_normalization": checks.real("cfg_normalization", given["cfg_normalization"], 0, 1e6),
        "cfg_truncation": None
        if given["cfg_truncation"] is None
        else checks.real("cfg_truncation", given["cfg_truncation"], 0, 1e6),
        "output_type": checks.choice("output_type", given["output_type"], checks.OUTPUT_TYPES),
        "callback": given["callback_on_step_end"],
        "callback_tensors": checks.callback(
            given["callback_on_step_end"], given["callback_on_step_end_tensor_inputs"]
        ),
        "encoding": encoding(given),
        "debug": bool(given["debug"]),
    }
    shape = (batch.images, limits.channels, height // limits.factor, width // limits.factor)
    seeds, latents = _start(shape, given)
    _warn(limits, scale, batch, given)
    return Run(batch, height, width, sigmas, own_sigmas, scale, seeds=seeds, latents=latents, **run)


def encoding(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `text.prompt.prompt_ids`, checked before any weight is touched."""
    length = whole("max_sequence_length", given["max_sequence_length"], 1, MAX_LENGTH)
    return {
        "max_sequence_length": length,
        "enable_thinking": bool(given["enable_thinking"]),
        "template": given["prompt_template"],
    }


def _start(
    shape: tuple[int, int, int, int], given: Mapping[str, Any]
) -> tuple[tuple[int | None, ...], torch.Tensor]:
    """Seeds and noise, from the one source that was named."""
    seed, generator = checks.seed(given["seed"], given["generator"]), given["generator"]
    none = (None,) * shape[0]
    if given["latents"] is not None:
        if seed is not None:
            raise BadArgument("seed and latents both choose the noise: give one")
        return none, checks.latents(given["latents"], shape)
    if generator is not None:
        return none, noise.from_generator(shape, generator)
    first = noise.fresh_seed() if seed is None else seed
    seeds = tuple((first + i) % (noise.MAX_SEED + 1) for i in range(shape[0]))
    return seeds, noise.from_seeds(shape, seeds)


def _warn(limits: Limits, scale: float, batch: Batch, given: Mapping[str, Any]) -> None:
    if limits.distilled and scale > 0:
        meaning = ""
        if scale <= 1:
            meaning = f"; off is 0, and {scale:g} here is the {scale + 1:g} of programs that count from 1"
        warnings.warn(
            f"guidance_scale={scale:g} runs the network twice a step and burns the pictures of this "
            f"checkpoint, which was distilled to need no guidance{meaning}",
            UserWarning,
            stacklevel=5,
        )
    if scale == 0 and given["negative_prompt"]:
        warnings.warn("negative_prompt has no effect at guidance_scale=0", UserWarning, stacklevel=5)


def call_back(
    pipe: Any, run: Run, denoise: Guided, step: int, timestep: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Give the caller's function the tensors that it asked for; put back what it returns.

    No lock is held meanwhile, and the dict that it returns is only read. As in diffusers, the function may
    set `pipe._guidance_scale` for the steps to come.
    """
    if run.callback is None:
        return latents
    sides = {"prompt_embeds": denoise.positive, "negative_prompt_embeds": denoise.negative}
    tensors = {"latents": latents, **sides}
    out = run.callback(pipe, step, timestep, {name: tensors[name] for name in run.callback_tensors})
    denoise.scale = checks.real("guidance_scale", pipe.guidance_scale, 0, checks.MAX_GUIDANCE)
    if denoise.scale > 0 and not denoise.negative:
        raise BadArgument("guidance_scale: the callback set it above 0 in a run that began without guidance")
    if out is None:
        return latents
    if not isinstance(out, dict):
        raise BadArgument(f"callback_on_step_end returned {checks.shown(out)}, wanted a dict or None")
    for name, now in sides.items():
        if out.get(name) is not None and out[name] is not now:
            new = embeds(name, out[name], pipe.transformer.config.cap_feat_dim)
            if len(new) != len(now):
                raise BadArgument(f"{name}: the callback returned {len(new)}, wanted {len(now)}")
            setattr(denoise, "positive" if name == "prompt_embeds" else "negative", new)
    changed = out.get("latents")
    if changed is None or changed is latents:
        return latents
    return checks.latents(changed, tuple(latents.shape)).to(latents.device)


def describe(run: Run, shift: float, dtype: torch.dtype) -> tuple[dict[str, Any], ...]:
    """Settings of each picture, for its PNG; nothing that differs between two equal runs, such as times."""
    common: dict[str, Any] = {
        "program": "zimage_core",
        "version": f"zimage_core {__version__}",
        "steps": run.steps,
        "sampler": "euler",
        "shift": shift,
        "guidance_scale": run.scale,
        "width": run.width,
        "height": run.height,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if run.scale > 0:
        common |= {"cfg_normalization": run.cfg_normalization, "cfg_truncation": run.cfg_truncation}
    if run.own_sigmas and run.steps <= MOST_SIGMAS:
        common["sigmas"] = [round(s, 6) for s in run.sigmas]
    if run.encoding != DEFAULT_ENCODING:
        changed = {k: v for k, v in run.encoding.items() if v != DEFAULT_ENCODING[k]}
        common |= {"prompt_template" if k == "template" else k: v for k, v in changed.items()}
    out = []
    for i, seed in enumerate(run.seeds):
        # given features took the place of the prompt, which would then be a guess about them
        words = {"prompt": run.batch.prompts[i]} if run.batch.prompts and not run.batch.prompt_embeds else {}
        if run.batch.negative_prompts and run.batch.negative_prompts[i]:
            words["negative_prompt"] = run.batch.negative_prompts[i]
        out.append({**words, "seed": seed, **common})
    return tuple(out)
