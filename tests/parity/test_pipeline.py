"""End to end against diffusers' ZImagePipeline on one checkpoint: same noise, same latents.

In float64 the two agree to rounding, whatever the CPU; in float32 they differ by less than float32 moves
diffusers itself (tests/helpers/parity.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import pipeline_parity
from tests.helpers.parity import NARROW, WIDE, apart, compare, in_float64
from tests.helpers.pipeline_parity import CASES, PROMPT, both, difference, generator, start
from zimage_core.models.transformer import TransformerBlock
from zimage_core.run import denoise
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=[3.0, 6.0], ids=["shift 3", "shift 6"])
def pairs(request, tmp_path_factory):
    return pipeline_parity.make_pairs(tmp_path_factory.mktemp("parity"), request.param)


@pytest.mark.parametrize("case", CASES)
def test_latents_after_the_last_step_match(pairs, case):
    found = difference(pairs, case)
    assert found.passes, found


def _another_shift(pipes, patch):
    for pipe in pipes:
        patch.setattr(pipe, "scheduler", FlowMatchEulerScheduler(1.01 * pipe.scheduler.shift))


def _conventional_guidance(pipes, patch):
    patch.setattr(denoise, "guide", lambda pos, neg, scale, cap: neg + scale * (pos - neg))


def _scale_and_gate_swapped(pipes, patch):
    original = TransformerBlock.modulation

    def modulation(self, temb):
        scale, gate, *rest = original(self, temb).chunk(4, -1)
        return torch.cat((gate, scale, *rest), -1)

    patch.setattr(TransformerBlock, "modulation", modulation)


def _time_a_little_late(pipes, patch):
    original = denoise.network_time
    patch.setattr(denoise, "network_time", lambda sigma: original(sigma * 0.99))


def _guidance_ends_late(pipes, patch):
    original = denoise.scale_at
    patch.setattr(denoise, "scale_at", lambda time, scale, end: original(time - 0.2, scale, end))


def _another_eps(pipes, patch):
    for pipe in pipes:
        patch.setattr(pipe.transformer.layers[0].ffn_norm1, "eps", 1e-6)


FAULTS = {
    _another_shift: "no guidance", _scale_and_gate_swapped: "no guidance", _time_a_little_late: "no guidance",
    _conventional_guidance: "guidance 4", _guidance_ends_late: "cfg_truncation 0.3",
    _another_eps: "no guidance",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_a_fault_would_be_seen(pairs, fault, monkeypatch):
    fault([ours for _, ours in (pairs.narrow, pairs.wide)], monkeypatch)
    found = difference(pairs, FAULTS[fault])
    assert found.float64 > 1000 * WIDE, found
    if fault is not _another_eps:  # 1e-6 for 1e-5 is too little for float32 to show
        assert found.float32 > 10 * NARROW * found.theirs, found


def test_cases_differ_from_each_other(pairs):
    """Each option changes the result, so that a case above cannot pass by ignoring it."""
    base = {"latents": torch.randn(1, 16, 4, 6, generator=generator()).clone}
    names = [c for c in CASES if "two" not in c]
    results = {name: both(pairs.narrow, **base, **CASES[name])[1] for name in names}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert apart(results[a], results[b]) > 1e-2, (a, b)


@pytest.mark.parametrize("many", [False, True], ids=["one generator", "one an image"])
def test_a_generator_draws_the_same_noise(pairs, many):
    def make():
        return [generator(), torch.Generator().manual_seed(7)] if many else generator()

    theirs, ours = pairs.narrow
    noise = theirs.prepare_latents(2, 16, 32, 48, torch.float32, torch.device("cpu"), make())
    options = {
        "prompt": ["a", "b"],
        "height": 32,
        "width": 48,
        "output_type": "latent",
        "num_inference_steps": 1,
    }
    drawn, given = ours(generator=make(), **options).images, ours(latents=noise, **options).images
    assert torch.equal(drawn, given)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_images_match(pairs, output_type):
    found = difference(pairs, "no guidance", "image", output_type=output_type)
    assert found.passes, found


def test_levels_of_a_image_match(pairs):
    images = both(pairs.narrow, generator=generator, output_type="pil")
    want, got = (np.asarray(side[0]).astype(int) for side in images)
    assert np.abs(want - got).max() <= 1  # a value near a half may round either way


def test_encoded_prompts_match(pairs):
    prompts = ["", PROMPT]

    @torch.no_grad()
    def run():
        theirs, ours = pairs.wide if torch.get_default_dtype() == torch.float64 else pairs.narrow
        want, want_negative = theirs.encode_prompt(list(prompts), negative_prompt=["x", ""])
        got, got_negative = ours.encode_prompt(prompts, negative_prompt=["x", ""])
        together = zip(want + want_negative, got + got_negative, strict=True)
        return {str(i): sides for i, sides in enumerate(together)}

    for found in compare("text encoder", "prompts", run):
        assert found.passes, found
    assert prompts == ["", PROMPT]


def test_the_callback_sees_the_same_steps(pairs):
    noise, logs = start("no guidance").double(), ([], [])
    with in_float64():
        for pipe, log in zip(pairs.wide, logs, strict=True):

            def note(pipe, i, t, tensors, log=log):
                log.append((i, float(t), tensors["latents"].clone(), len(tensors["prompt_embeds"])))
                return {"latents": tensors["latents"] * 0.9} if i == 2 else {}

            pipe(PROMPT, height=32, width=48, num_inference_steps=8, guidance_scale=0.0,
                 latents=noise.clone(), output_type="latent", callback_on_step_end=note,
                 callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])  # fmt: skip
    assert len(logs[0]) == len(logs[1]) == 8
    for (i, t, x, n), (j, u, y, m) in zip(*logs, strict=True):
        assert (i, t, n) == (j, u, m)
        assert apart(x, y) <= WIDE


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_noise_levels_are_equal_to_the_bit(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=0.7)
    got = FlowMatchEulerScheduler(shift).sigmas(steps)
    assert theirs.sigmas.tolist() == list(got)


def test_every_argument_of_diffusers_exists_with_its_place_and_default(pairs):
    import inspect

    theirs, ours = (list(inspect.signature(type(p).__call__).parameters.values()) for p in pairs.narrow)
    for a, b in zip(theirs, ours, strict=False):
        assert a.name == b.name
    # these defaults follow the checkpoint, or cannot be modified by accident
    ours_alone = {"num_inference_steps", "guidance_scale", "callback_on_step_end_tensor_inputs"}
    for a, b in zip(theirs, ours, strict=False):
        assert a.default == b.default or a.name in ours_alone, a.name
