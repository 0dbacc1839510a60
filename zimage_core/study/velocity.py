"""The error of the predicted velocity with other weights, on calls recorded in the real denoising loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.models.transformer import Prepared, ZImageTransformer
from zimage_core.nn.attention import settings
from zimage_core.pipeline import ZImagePipeline
from zimage_core.study.step_hook import StepHook


@dataclass(frozen=True)
class Call:
    """Inputs and output of one step of the transformer for one image.

    Args:
        latent: The latent of the image, [C, h, w].
        time: The network's time, a float32 value.
        caption: Features of the caption, [L, cap_feat_dim].
        velocity: The output, [C, h, w].
    """

    latent: Tensor
    time: float
    caption: Tensor
    velocity: Tensor

    @property
    def energy(self) -> float:
        """Sum of the squares of the velocity."""
        return float(self.velocity.double().square().sum())


def check_whole(pipe: ZImagePipeline) -> None:
    """Refuse a pipeline whose transformer's weights cannot be exchanged in place.

    Raises:
        Unsupported: The pipeline has a memory limit, or replays its steps as graphs, which run no hooks.
    """
    if pipe._placement.memory is not None:
        raise Unsupported("a memory limit moves weights in and out; measure without it (no --vram, no --ram)")
    if pipe._placement.graphs is not None:
        raise Unsupported("captured steps run no hooks; measure before `capture`, or build the pipeline anew")


def record(
    pipe: ZImagePipeline, prompts: Sequence[str], *, seed: int = 0, every: int = 1, **options: Any
) -> list[Call]:
    """Generate an image of each prompt and record the transformer's inputs and outputs.

    Args:
        pipe: The model, with weights as close to the original ones as possible.
        prompts: Prompts that are typical of the model's use.
        seed: Seed of the first image; each next image has the next seed.
        every: Keep one of this many calls. Each image starts at another offset, so that all noise levels are
            covered.
        options: Further arguments of the pipeline's call: size, steps, guidance.

    Returns:
        The calls, in the order in which they were made.

    Raises:
        BadArgument: There is no prompt, or `every` is below 1.
        Unsupported: The weights cannot be exchanged in place (`check_whole`).
    """
    if not prompts:
        raise BadArgument("prompts: there are none; give at least one")
    if every < 1:
        raise BadArgument(f"every: got {every}, wanted 1 or more")
    check_whole(pipe)
    calls: list[Call] = []
    first = 0

    def keep(latent: Tensor, prepared: Prepared, step: int, caption: int, velocity: Tensor) -> None:
        if (step + first) % every == 0:
            calls.append(Call(latent, prepared.times[step], prepared.captions[caption], velocity))

    handle = StepHook(pipe.transformer, after=keep)
    try:
        for i, prompt in enumerate(prompts):
            first = -i % every
            pipe(prompt, seed=(seed + i) % 2**64, output_type="latent", **options)
    finally:
        handle.remove()
    return calls


def velocity_error(transformer: ZImageTransformer, calls: Sequence[Call]) -> float:
    """Squared error of the velocity divided by its square, each summed over calls; 0 for equal weights."""
    wrong = 0.0
    with torch.inference_mode(), settings(transformer.device, "transformer", transformer.dtype):
        for call in calls:
            size = (call.latent.shape[-2], call.latent.shape[-1])
            prepared = transformer.prepare([call.caption], [call.time], size)
            found = transformer.step(call.latent, prepared, 0)
            wrong += float((found - call.velocity).double().square().sum())
    energy = sum(call.energy for call in calls)
    return wrong / energy if energy else 0.0
