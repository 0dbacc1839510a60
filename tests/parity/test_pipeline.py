"""End to end against diffusers' ZImagePipeline on one checkpoint: same noise, same latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import pipeline_parity
from tests.helpers.pipeline_parity import CASES, PROMPT, both, generator, start
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

pytestmark = pytest.mark.parity

LATENTS = 1e-4
"""Eight steps multiply the float32 rounding of one forward (1e-6 of values near 4) by the sensitivity of the
network; found here: 2e-6 without guidance, 4e-5 at guidance 4."""


@pytest.fixture(scope="module", params=[3.0, 6.0], ids=["shift 3", "shift 6"])
def pair(request, tmp_path_factory):
    return pipeline_parity.make_pair(tmp_path_factory.mktemp("parity"), request.param)


@pytest.mark.parametrize("case", CASES)
def test_latents_after_the_last_step_match(pair, case):
    want, got = both(pair, latents=start(case).clone, **CASES[case])
    assert want.shape == got.shape
    assert float(want.abs().max()) > 0.5  # a comparison of zeros would say nothing
    error = float((want - got).abs().max())
    assert error <= LATENTS, f"{case}: {error}"


def test_cases_differ_from_each_other(pair):
    """Each option changes the result, so that a case above cannot pass by ignoring it."""
    base = {"latents": torch.randn(1, 16, 4, 6, generator=generator()).clone}
    names = [c for c in CASES if "two" not in c]
    results = {name: both(pair, **base, **CASES[name])[1] for name in names}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert float((results[a] - results[b]).abs().max()) > 10 * LATENTS, (a, b)


@pytest.mark.parametrize("many", [False, True], ids=["one generator", "one a picture"])
def test_a_generator_draws_the_same_noise(pair, many):
    def make():
        return [generator(), torch.Generator().manual_seed(7)] if many else generator()

    want, got = both(pair, prompt=lambda: ["a", "b"], generator=make)
    assert float((want - got).abs().max()) <= LATENTS
    noise_alone, ours = both(pair, prompt=lambda: ["a", "b"], generator=make, num_inference_steps=1)
    assert float((noise_alone - ours).abs().max()) <= LATENTS


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pictures_match(pair, output_type):
    want, got = both(pair, generator=generator, output_type=output_type)
    if output_type == "pil":
        levels = np.asarray(want[0]).astype(int) - np.asarray(got[0]).astype(int)
        assert np.abs(levels).max() <= 1  # a value near a half may round either way
        return
    assert want.shape == tuple(got.shape)
    assert float(np.abs(np.asarray(want) - np.asarray(got)).max()) <= 1e-4


@torch.no_grad()
def test_encoded_prompts_match(pair):
    theirs, ours = pair
    prompts = ["", PROMPT]
    want, want_negative = theirs.encode_prompt(list(prompts), negative_prompt=["x", ""])
    got, got_negative = ours.encode_prompt(prompts, negative_prompt=["x", ""])
    for a, b in zip(want + want_negative, got + got_negative, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5
    assert prompts == ["", PROMPT]


def test_the_callback_sees_the_same_steps(pair):
    logs: list[list[Any]] = [[], []]
    for pipe, log in zip(pair, logs, strict=True):

        def note(pipe, i, t, tensors, log=log):
            log.append((i, float(t), tensors["latents"].clone(), len(tensors["prompt_embeds"])))
            return {"latents": tensors["latents"] * 0.9} if i == 2 else {}

        pipe(PROMPT, height=32, width=32, num_inference_steps=8, guidance_scale=0.0, generator=generator(),
             output_type="latent", callback_on_step_end=note,
             callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])  # fmt: skip
    assert len(logs[0]) == len(logs[1]) == 8
    for (i, t, x, n), (j, u, y, m) in zip(*logs, strict=True):
        assert (i, t, n) == (j, u, m)
        assert float((x - y).abs().max()) <= LATENTS


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_noise_levels_are_equal_to_the_bit(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=0.7)
    got = FlowMatchEulerScheduler(shift).sigmas(steps)
    assert theirs.sigmas.tolist() == list(got)


def test_every_argument_of_diffusers_exists_with_its_place_and_default(pair):
    import inspect

    theirs, ours = (list(inspect.signature(type(p).__call__).parameters.values()) for p in pair)
    for a, b in zip(theirs, ours, strict=False):
        assert a.name == b.name
    # these defaults follow the checkpoint, or cannot be modified by accident
    ours_alone = {"num_inference_steps", "guidance_scale", "callback_on_step_end_tensor_inputs"}
    for a, b in zip(theirs, ours, strict=False):
        assert a.default == b.default or a.name in ours_alone, a.name
