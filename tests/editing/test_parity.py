"""Image to image and inpainting against diffusers' pipelines on one checkpoint: levels, latents, images.

In float64 the two agree to rounding; in float32 they differ by less than float32 moves diffusers itself
(tests/helpers/parity.py), and by less than 1e-4.
"""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch

import zimage_core
from tests.helpers import editing_parity
from tests.helpers.editing_parity import CASES, KINDS, H, W, both, difference, generators, picture, stroke
from tests.helpers.parity import apart
from tests.helpers.pipeline_parity import PROMPT
from zimage_core.run.request import Request, prepare

pytestmark = pytest.mark.parity
CLOSE = 1e-4
"""Largest absolute difference of float32 latents, which are 1 to 5."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return editing_parity.make_pairs(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def pipes(pairs):
    """diffusers' two pipelines, and ours."""
    return pairs[torch.float32]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_diffusers(pairs, kind, case):
    found = difference(pairs, kind, case)
    assert found.passes, found
    assert found.float32 <= CLOSE, found


def test_cases_differ_from_each_other(pipes):
    """Each option changes the result, so that a case above cannot pass by ignoring it."""
    alone = [case for case in CASES if "two" not in case and "another" not in case]
    for kind in KINDS:
        found = [both(pipes, kind, case)[1] for case in alone]
        assert min(apart(a, b) for i, a in enumerate(found) for b in found[i + 1 :]) > 100 * CLOSE


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_images_are_those_of_diffusers(pipes, output_type):
    want, got = both(pipes, "img2img", "strength 0.6", output_type=output_type)
    assert apart(want, got) <= CLOSE
    want, got = both(pipes, "inpaint", "strength 0.6", output_type=output_type)
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


def levels(pipe, steps, strength):
    request = Request(prompt="a", image=picture(), strength=strength, num_inference_steps=steps, seed=0)
    return list(prepare(pipe.limits, pipe.scheduler, request).sigmas)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_of_diffusers_exists_with_its_place_and_default(pipes, kind):
    name = {"img2img": "ZImageImg2ImgPipeline", "inpaint": "ZImageInpaintPipeline"}[kind]
    calls = [getattr(package, name).__call__ for package in (diffusers, zimage_core)]
    theirs, ours = (list(inspect.signature(call).parameters.values()) for call in calls)
    ours_alone = {"num_inference_steps", "guidance_scale", "callback_on_step_end_tensor_inputs"}
    for a, b in zip(theirs, ours, strict=False):
        assert a.name == b.name
        assert a.default == b.default or a.name in ours_alone, a.name
    assert len(ours) > len(theirs)
