"""Latents of whole runs with control against diffusers' two pipelines, in float32 and in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import controls
from tests.helpers.parity import WIDE, apart, in_float64, widen
from tests.helpers.pipeline_parity import PROMPT, TheirTokenizer, write_checkpoint
from zimage_core import ZImageControlNetInpaintPipeline, ZImageControlNetPipeline


def picture(seed, size=(48, 32), mode="RGB"):
    shape = size[::-1] + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


CASES = {
    "no guidance": {},
    "guidance 4": {"guidance_scale": 4.0, "negative_prompt": "blue"},
    "two images a prompt": {"num_images_per_prompt": 2, "controlnet_conditioning_scale": 0.6},
    "two prompts, two control images": {
        "prompt": ["a", PROMPT], "guidance_scale": 2.0, "control_image": [picture(1), picture(2)],
    },
    "image of another size": {"control_image": picture(3, (40, 40))},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("control"), 3.0)


def pair(checkpoint, variant, inpaint):
    """diffusers' pipeline and ours with the same networks."""
    import diffusers
    import transformers

    theirs = diffusers.ZImageControlNetInpaintPipeline if inpaint else diffusers.ZImageControlNetPipeline
    ours = ZImageControlNetInpaintPipeline if inpaint else ZImageControlNetPipeline
    net = controls.controlnet(variant, controls.TINY)
    their_net = controls.their_net(variant, net, controls.TINY)
    their_net.requires_grad_(False)
    them = theirs(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint / "scheduler"),
        vae=diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae"),
        text_encoder=transformers.Qwen3Model.from_pretrained(
            checkpoint / "text_encoder", dtype=torch.float32
        ),
        tokenizer=None,
        transformer=diffusers.ZImageTransformer2DModel.from_pretrained(checkpoint / "transformer"),
        controlnet=their_net,
    )
    them.tokenizer = TheirTokenizer()
    them.set_progress_bar_config(disable=True)
    us = ours.from_pretrained(checkpoint, controlnet=net)
    net.hints = "diffusers"
    return them, us


def both(pipes, call):
    images = len(call.get("prompt", "x")) if isinstance(call.get("prompt"), list) else 1
    images *= call.get("num_images_per_prompt", 1)
    noise = torch.randn(images, 16, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    usual = {
        "prompt": PROMPT, "height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 0.0,
        "output_type": "latent", "control_image": picture(1),
    }  # fmt: skip
    found = []
    for pipe in pipes:
        own = {**usual, **call, "latents": noise.to(torch.get_default_dtype())}
        own = {k: list(v) if isinstance(v, list) else v for k, v in own.items()}  # diffusers changes lists
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found.append(pipe(**own).images)
    return found


def compare(checkpoint, variant, inpaint, calls):
    pipes = pair(checkpoint, variant, inpaint)
    for case, call in calls.items():
        theirs, ours = both(pipes, call)
        assert apart(theirs, ours) <= 1e-4 * float(theirs.abs().max()), case
    pipes = pair(checkpoint, variant, inpaint)  # diffusers keeps the rotations of its first call
    for pipe in pipes:
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae, pipe.controlnet):
            widen(part)
    with in_float64():
        for case, call in calls.items():
            theirs, ours = both(pipes, call)
            assert apart(theirs, ours) <= WIDE, case


@pytest.mark.parametrize("variant", ["1.0", "2.1"])
def test_a_run_gives_the_latents_of_diffusers(checkpoint, variant):
    compare(checkpoint, variant, False, CASES if variant == "1.0" else {"guidance 4": CASES["guidance 4"]})


def test_an_inpainting_run_gives_the_latents_of_diffusers(checkpoint):
    mask = Image.fromarray((np.arange(32 * 48).reshape(32, 48) % 48 > 20).astype(np.uint8) * 255)
    call = {"image": picture(5), "mask_image": mask}
    compare(checkpoint, "2.0", True, {"a mask": call, "guidance": {**call, "guidance_scale": 3.0}})


def test_a_tensor_of_the_vae_range_is_taken_as_it_is(checkpoint):
    tensor = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    theirs, ours = both(pair(checkpoint, "1.0", False), {"control_image": tensor})
    assert apart(theirs, ours) <= 1e-4 * float(theirs.abs().max())
