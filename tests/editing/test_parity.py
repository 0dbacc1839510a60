"""Image to image and inpainting against diffusers' pipelines on one checkpoint: levels, latents, images."""

from __future__ import annotations

import warnings

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import pipeline_parity
from tests.helpers.parity import apart
from tests.helpers.pipeline_parity import PROMPT
from zimage_core import ZImagePipeline

pytestmark = pytest.mark.parity
H, W = 32, 48
CLOSE = 1e-4
"""Largest absolute difference of float32 latents, which are 1 to 5."""


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """diffusers' two pipelines, and ours."""
    theirs, ours = pipeline_parity.make_pairs(tmp_path_factory.mktemp("parity"), 3.0).narrow
    found = {}
    for name, kind in (
        ("img2img", diffusers.ZImageImg2ImgPipeline),
        ("inpaint", diffusers.ZImageInpaintPipeline),
    ):
        found[name] = kind(**theirs.components)
        found[name].set_progress_bar_config(disable=True)
    return found, ours


def picture(seed=0, size=(H, W)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)


def stroke(size=(H, W)):
    """A mask whose edges lie between latents, and between 0 and 1."""
    mask = np.zeros(size, np.uint8)
    mask[5:27, 13:37], mask[5:9, 13:20] = 255, 127
    return Image.fromarray(mask)


def generators(count=None):
    if count is None:
        return torch.Generator().manual_seed(5)
    return [torch.Generator().manual_seed(5 + i) for i in range(count)]


COMMON = {
    "defaults": {},
    "strength 0.3": {"strength": 0.3},
    "strength 1": {"strength": 1.0},
    "one step of eight": {"strength": 0.01},
    "five steps, 0.5": {"num_inference_steps": 5, "strength": 0.5},
    "own sigmas": {"sigmas": [1.0, 0.7, 0.4, 0.2], "strength": 0.6},
    "guidance 4": {"guidance_scale": 4.0, "negative_prompt": "blue", "strength": 0.7},
    "cfg_truncation": {"guidance_scale": 4.0, "cfg_truncation": 0.5, "cfg_normalization": 0.7},
    "two prompts": {"prompt": ["a", "b c d"], "guidance_scale": 2.0},
    "two images a prompt": {"num_images_per_prompt": 2},
    "two generators": {"prompt": ["a", "b"], "generator": 2},
    "two images": {"prompt": ["a", "b"], "image": [0, 1]},
    "two images and generators": {"prompt": ["a", "b"], "image": [0, 1], "generator": 2},
    "another size": {"image": [(37, 61)], "height": None, "width": None},
    "given latents": {"latents": True, "strength": 0.4},
}


def both(pipes, kind, case, **options):
    """The images of both for one case; arguments are made anew, since diffusers changes lists."""
    theirs, ours = pipes

    def arguments():
        given = {"prompt": PROMPT, "height": H, "width": W, "num_inference_steps": 8, "guidance_scale": 0.0,
                 "output_type": "latent", "strength": 0.6, **COMMON[case], **options}  # fmt: skip
        sources = given.pop("image", [0])
        if isinstance(sources[0], tuple):
            given["image"] = picture(size=sources[0])
        else:
            images = [picture(each) for each in sources]
            given["image"] = images if len(images) > 1 else images[0]
        size = given["image"].size[::-1] if isinstance(given["image"], Image.Image) else (H, W)
        if kind == "inpaint":
            given["mask_image"] = stroke(size)
        given["prompt"] = list(given["prompt"]) if isinstance(given["prompt"], list) else given["prompt"]
        given["generator"] = generators(given.pop("generator", None))
        if given.get("latents"):
            given["latents"] = torch.randn(1, 16, H // 8, W // 8, generator=generators())
        return {name: value for name, value in given.items() if value is not None}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs[kind](**arguments()).images, ours(**arguments()).images


@pytest.mark.parametrize("case", COMMON)
@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_latents_are_those_of_diffusers(pipes, kind, case):
    want, got = both(pipes, kind, case)
    assert apart(want, got) <= CLOSE


def test_cases_differ_from_each_other(pipes):
    """Each option changes the result, so that a case above cannot pass by ignoring it."""
    alone = [case for case in COMMON if "two" not in case and "another" not in case and case != "defaults"]
    for kind in ("img2img", "inpaint"):
        found = [both(pipes, kind, case)[1] for case in alone]
        assert min(apart(a, b) for i, a in enumerate(found) for b in found[i + 1 :]) > 100 * CLOSE


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_images_are_those_of_diffusers(pipes, output_type):
    want, got = both(pipes, "img2img", "defaults", output_type=output_type)
    assert apart(want, got) <= CLOSE
    want, got = both(pipes, "inpaint", "defaults", output_type=output_type)
    mask = torch.from_numpy(np.array(stroke()) >= 128).expand(1, 3, H, W)
    want, got = (torch.as_tensor(each) for each in (want, got))
    if output_type == "np":
        want, got = want.permute(0, 3, 1, 2), got.permute(0, 3, 1, 2)
    assert apart(want[mask], got[mask]) <= CLOSE  # outside ours are those of the image


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 9, 28])
def test_noise_levels_are_equal_to_the_bit(pipes, steps):
    theirs, ours = pipes
    pipe = theirs["img2img"]
    for strength in (0.01, 0.1, 0.125, 0.3, 0.5, 0.6, 0.7, 0.99, 1.0, 1):
        pipe.scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=0.7)
        pipe.get_timesteps(steps, strength, "cpu")
        want = pipe.scheduler.sigmas[pipe.scheduler.begin_index :].tolist()
        assert want == levels(ours, steps, strength), strength


def levels(pipe: ZImagePipeline, steps, strength):
    from zimage_core.run.request import Request, prepare

    request = Request(prompt="a", image=picture(), strength=strength, num_inference_steps=steps, seed=0)
    return list(prepare(pipe.limits, pipe.scheduler, request).sigmas)


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_the_callback_sees_the_same_steps(pipes, kind):
    logs = ([], [])
    for pipe, log in ((pipes[0][kind], logs[0]), (pipes[1], logs[1])):

        def note(pipe, i, t, tensors, log=log):
            log.append((i, float(t), tensors["latents"].clone()))
            return {"latents": tensors["latents"] * 0.9}

        mask = {"mask_image": stroke()} if kind == "inpaint" else {}
        pipe(prompt=PROMPT, image=picture(), height=H, width=W, num_inference_steps=8, guidance_scale=0.0,
             strength=0.6, generator=generators(), output_type="latent", callback_on_step_end=note,
             **mask)  # fmt: skip
    assert [(i, t) for i, t, _ in logs[0]] == [(i, t) for i, t, _ in logs[1]]
    assert len(logs[0]) == 5
    assert all(apart(a[2], b[2]) <= CLOSE for a, b in zip(*logs, strict=True))


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_every_argument_of_diffusers_exists_with_its_place_and_default(pipes, kind):
    import inspect

    import zimage_core

    name = {"img2img": "ZImageImg2ImgPipeline", "inpaint": "ZImageInpaintPipeline"}[kind]
    calls = [getattr(package, name).__call__ for package in (diffusers, zimage_core)]
    theirs, ours = (list(inspect.signature(call).parameters.values()) for call in calls)
    ours_alone = {"num_inference_steps", "guidance_scale", "callback_on_step_end_tensor_inputs"}
    for a, b in zip(theirs, ours, strict=False):
        assert a.name == b.name
        assert a.default == b.default or a.name in ours_alone, a.name
    assert len(ours) > len(theirs)
