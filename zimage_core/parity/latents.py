"""Some steps of the denoising loop, compared with diffusers' pipeline: times, signs, noise levels, Euler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zimage_core.models.transformer import ZImageTransformer
from zimage_core.parity.blocks import PeerFailed, Values, blamed, copy_in_float64, judged, peer_network
from zimage_core.parity.lending import Lender
from zimage_core.parity.peers import CAPTION, LATENT, Pair, drawn, library
from zimage_core.parity.precision import FLOAT32, in_float64
from zimage_core.parity.report import Block, Component
from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling.schedule import FlowMatchEulerScheduler


def compare_latents(
    pair: Pair, ours: ZImageTransformer, scheduler: FlowMatchEulerScheduler, steps: int, float64: bool
) -> Component:
    """Compare the latents after each step of a run without guidance.

    Args:
        pair: The peer of the transformer.
        ours: The transformer, in float32.
        scheduler: The schedule.
        steps: Number of steps.
        float64: Whether ours is compared in float64 as well.
    """
    diffusers = library("diffusers", "ZImagePipeline")
    lender, config = Lender(ours), ours.config

    def call(pipe: Any) -> Values:
        found: dict[str, Tensor] = {}

        def keep(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            found[f"after step {step + 1}"] = tensors["latents"].flatten(0, -2).clone()
            return {}

        pipe(
            prompt_embeds=[drawn(2, CAPTION, config.cap_feat_dim)],
            latents=drawn(1, 1, config.in_channels, *LATENT),
            height=LATENT[0] * 8,
            width=LATENT[1] * 8,
            num_inference_steps=steps,
            guidance_scale=0.0,
            output_type="latent",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
        )
        return found

    def theirs(dtype: torch.dtype) -> Values:
        network = peer_network(pair, lender, dtype)
        with blamed(lambda: "in its pipeline"), torch.no_grad():
            schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=scheduler.shift)
            pipe = diffusers.ZImagePipeline(
                scheduler=schedule, vae=None, text_encoder=None, tokenizer=None, transformer=network
            )
            pipe.set_progress_bar_config(disable=True)
            return call(pipe)

    blocks: tuple[Block, ...] = ()
    problem = ""
    own = call(ZImagePipeline(transformer=ours, scheduler=scheduler))
    try:
        narrow = theirs(FLOAT32)
        with in_float64():
            wide = theirs(torch.float64)
            own_wide = None
            if float64:
                copy = copy_in_float64(ours, lender)
                own_wide = call(ZImagePipeline(transformer=copy, scheduler=scheduler))
        blocks = tuple(judged(name, narrow, wide, own, None, own_wide) for name in narrow)
    except PeerFailed as error:
        problem = str(error)
    return Component(
        name="latents",
        peer=f"diffusers {diffusers.__version__} ZImagePipeline",
        weights="of the transformer",
        quantised=False,
        inputs=f"{steps} steps at shift {scheduler.shift:g}, without guidance",
        blocks=blocks,
        problem=problem,
    )
