"""What a change of weights does to the predicted velocity, on calls recorded from the real denoising loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.pipeline import ZImagePipeline


@dataclass(frozen=True)
class Call:
    """One call of the transformer, and its answer.

    Args:
        latents: Each [C, 1, h, w].
        times: float32 [len(latents)].
        captions: Each [L, cap_feat_dim].
        velocity: Each [C, 1, h, w].
    """

    latents: tuple[Tensor, ...]
    times: Tensor
    captions: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]

    @property
    def energy(self) -> float:
        """Sum of the squares of its velocity."""
        return sum(float(v.double().square().sum()) for v in self.velocity)


def check_whole(pipe: ZImagePipeline) -> None:
    """Its transformer's weights must be where the computation is, and its own to exchange.

    Raises:
        Unsupported: The pipeline has a memory limit, or replays its steps as graphs, which run no hooks.
    """
    if pipe._arena is not None:
        raise Unsupported("a memory limit moves weights in and out; measure without it (no --vram, no --ram)")
    if pipe._graphs is not None:
        raise Unsupported("captured steps run no hooks; measure before `capture`, or build the pipeline anew")


def record(
    pipe: ZImagePipeline, prompts: Sequence[str], *, seed: int = 0, every: int = 1, **options: Any
) -> list[Call]:
    """Draw each prompt once and keep what the transformer was asked and said.

    Args:
        pipe: The model, as close to its original weights as there is.
        prompts: Typical of what the model will be asked.
        seed: Of the first picture; every picture has the next one.
        every: Keep one call of so many, another one of each picture, so that all noise levels take part.
        options: Further arguments of the pipeline's call: size, steps, guidance.

    Raises:
        BadArgument: No prompt, or `every` below 1.
        Unsupported: See `check_whole`.
    """
    if not prompts:
        raise BadArgument("prompts: there are none; give at least one")
    if every < 1:
        raise BadArgument(f"every: got {every}, wanted 1 or more")
    check_whole(pipe)
    calls: list[Call] = []
    count = 0

    def keep(net: object, args: tuple[Any, ...], velocity: Sequence[Tensor]) -> None:
        nonlocal count
        if count % every == 0:
            latents, times, captions = args[:3]
            calls.append(Call(tuple(latents), times.clone(), tuple(captions), tuple(velocity)))
        count += 1

    handle = pipe.transformer.register_forward_hook(keep)
    try:
        for i, prompt in enumerate(prompts):
            count = -i % every
            pipe(prompt, seed=(seed + i) % 2**64, output_type="latent", **options)
    finally:
        handle.remove()
    return calls


def velocity_error(transformer: ZImageTransformer, calls: Sequence[Call]) -> float:
    """Squared error of the velocity over its square, summed over calls; 0 with the recorded weights."""
    wrong = 0.0
    with torch.inference_mode():
        for call in calls:
            found = transformer(call.latents, call.times, call.captions)
            pairs = zip(found, call.velocity, strict=True)
            wrong += sum(float((a - b).double().square().sum()) for a, b in pairs)
    energy = sum(call.energy for call in calls)
    return wrong / energy if energy else 0.0
