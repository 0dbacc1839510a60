"""Samplers, schedules and variety in a run of a pipeline."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import tiny
from zimage_core.errors import BadArgument
from zimage_core.files.png import text_chunks
from zimage_core.sampling.samplers import SAMPLERS, SCHEDULES
from zimage_core.sampling.variety import vary

SHORT = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def base():
    return tiny.pipeline(shift=6.0)


def test_euler_and_linear_are_what_a_call_without_names_gives(pipe):
    plain = pipe("a", seed=1, **SHORT)
    named = pipe("a", seed=1, sampler="euler", schedule="linear", variety=0, **SHORT)
    assert torch.equal(plain.images, named.images)
    assert plain.settings == named.settings
    assert plain.settings[0]["sampler"] == "euler"
    assert not {"schedule", "variety"} & set(plain.settings[0])


def test_settings_state_what_an_image_was_made_with(pipe):
    made = pipe("a", seed=1, sampler="heun", schedule="beta", variety=0.1, **SHORT)
    assert made.settings[0] | {"sampler": "heun", "schedule": "beta", "variety": 0.1} == made.settings[0]
    assert made.settings[0]["steps"] == 3
    assert "Sampler: Heun, Schedule type: Beta" in text_chunks(made.metadata())["parameters"]


def test_every_name_has_one_in_the_text_that_other_programs_read():
    for name in SAMPLERS:
        assert "Sampler: " in text_chunks({"sampler": name})["parameters"], name
    for name in SCHEDULES:
        assert "Schedule type: " in text_chunks({"schedule": name})["parameters"], name


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_differ_and_an_image_does_not_depend_on_its_batch(pipe, name):
    both = pipe(["a", "b"], seed=5, sampler=name, **SHORT).images
    alone = pipe("b", seed=6, sampler=name, **SHORT).images
    assert torch.equal(both[1:], alone)
    assert torch.equal(alone, pipe("b", seed=6, sampler=name, **SHORT).images)
    if name != "euler":
        assert not torch.equal(alone, pipe("b", seed=6, **SHORT).images)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_truncation_debug_and_hooks_go_the_same_way(base, name):
    call = {"seed": 2, "sampler": name, "guidance_scale": 2.0, "cfg_truncation": 0.2, **SHORT}
    plain = base("a", **call).images
    assert torch.equal(plain, base("a", debug=True, **call).images)
    handle = base.transformer.register_forward_hook(lambda *_: None)
    try:
        hooked = base("a", **call).images
    finally:
        handle.remove()
    # each step is prepared anew, one time instead of three in a product
    torch.testing.assert_close(hooked, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "lcm"])
def test_callbacks_count_steps_and_end_a_run(pipe, name):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, pipe.num_timesteps))
        pipe._interrupt = step == 1

    result = pipe("a", seed=1, sampler=name, callback_on_step_end=callback, **SHORT)
    assert seen == [(0, 3), (1, 3)]
    assert result.interrupted
    assert len(result.timings.steps) == 2


def test_denoised_is_the_estimate_of_the_clean_latents(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors)
        return {"denoised": torch.zeros(1)}  # has no effect

    names = ["latents", "denoised"]
    out = pipe("a", seed=1, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **SHORT)
    assert torch.equal(out.images, pipe("a", seed=1, **SHORT).images)
    before = pipe("a", seed=1, **SHORT)
    # the last step of Euler goes to the estimate itself
    torch.testing.assert_close(seen[-1]["denoised"], before.images, rtol=0, atol=1e-5)
    # x1 = x0 + (s1 - s0) v and x0 - s0 v give v, whatever the step
    s0, s1 = out.sigmas[1:3]
    x1, x2, clean = seen[0]["latents"], seen[1]["latents"], seen[1]["denoised"]
    torch.testing.assert_close(clean, x1 - s0 * (x2 - x1) / (s1 - s0), rtol=0, atol=1e-4)


def test_step_noise_without_seeds_is_reproducible_too(pipe):
    call = {"sampler": "euler_ancestral", **SHORT}

    def by_generator(seed):
        return pipe("a", generator=torch.Generator().manual_seed(seed), **call).images

    assert torch.equal(by_generator(4), by_generator(4))
    assert not torch.equal(by_generator(4), by_generator(5))
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    first = pipe(["a", "a"], latents=latents, **call).images
    torch.manual_seed(3)
    assert torch.equal(first, pipe(["a", "a"], latents=latents, **call).images)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_choose_the_noise_levels(pipe, name):
    got = pipe("a", seed=1, schedule=name, **SHORT).sigmas
    assert len(got) == 4
    assert (got == pipe("a", seed=1, **SHORT).sigmas) == (name == "linear")


def test_a_shift_that_no_schedule_takes_is_told(pipe):
    with pytest.warns(UserWarning, match="shift has no effect on schedule='bong_tangent'"):
        pipe("a", seed=1, schedule="bong_tangent", shift=3.0, **SHORT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sampler": "eulr"}, "sampler: got 'eulr', wanted one of euler, heun, res_multistep"),
        ({"sampler": 3}, "sampler: got 3, wanted one of euler"),
        ({"sampler": "e\x1b[31m"}, r"sampler: got 'e\\+x1b"),
        ({"schedule": "karras"}, "schedule: got 'karras', wanted one of linear, simple, beta, bong_tangent"),
        ({"schedule": "beta", "sigmas": [1.0, 0.5]}, "sigmas and schedule both choose the noise levels"),
        ({"variety": -0.1}, "variety: got -0.1, wanted a number from 0 to 100"),
        ({"variety": math.nan}, "variety: got nan"),
        ({"variety": math.inf}, "variety: got inf"),
        ({"variety": "much"}, "variety: got 'much'"),
    ],
)
def test_bad_names_and_numbers_are_one_sentence(pipe, call, message):
    with pytest.raises(BadArgument, match=message):
        pipe("a", seed=1, **call, **SHORT)


def test_variety_moves_each_image_by_its_seed(pipe):
    call = {"variety": 2.0, **SHORT}
    both = pipe(["a", "a"], seed=5, **call).images
    assert torch.equal(both[1:], pipe("a", seed=6, **call).images)
    start = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    same_noise = pipe(["a", "a"], latents=start, **call).images
    assert not torch.equal(same_noise[0], same_noise[1])


def test_variety_leaves_the_negative_side_alone(base):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors)

    names = ["prompt_embeds", "negative_prompt_embeds"]
    base("a", seed=1, variety=1.0, negative_prompt="b", callback_on_step_end=callback,
         callback_on_step_end_tensor_inputs=names, **SHORT)  # fmt: skip
    positive, negative = base.encode_prompt("a", negative_prompt="b")
    assert torch.equal(seen[0]["negative_prompt_embeds"][0], negative[0])
    assert torch.equal(seen[0]["prompt_embeds"][0], vary(positive[0], 1, 1.0))


def test_vary_changes_half_of_the_entries_by_at_most_its_share_of_the_deviation():
    caption = torch.randn(90, 100, generator=torch.Generator().manual_seed(1)) * 3 + 1
    changed = vary(caption, 4, 0.2) - caption
    assert float((changed != 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(changed.abs().max()) == pytest.approx(0.2 * float(caption.std()), rel=0.01)
    assert torch.equal(vary(caption, 4, 0.2) - caption, changed)
    assert vary(caption.bfloat16(), 4, 0.2).dtype == torch.bfloat16
    assert vary(caption, 2**64 - 1, 0.2).shape == caption.shape


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_can_be_begun_from_with_every_sampler(pipe, name):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(32, 32)
    mask[:, 16:] = 1
    call = {"image": image, "strength": 0.7, "sampler": name, "seed": 1, "num_inference_steps": 4}
    made = pipe("a", mask_image=mask, output_type="pt", **call).images
    assert torch.equal((made[0, :, :, :16] * 255).round(), (image[:, :, :16] * 255).round())
    whole = pipe("a", output_type="latent", **call)
    assert len(whole.sigmas) == 4
    assert bool(torch.isfinite(whole.images).all())
