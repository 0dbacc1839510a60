"""Steps by hand are those of diffusers' scheduler, and those of a run."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch

from zimage_core import BadArgument, BadFile, FlowMatchEulerScheduler, Unsupported
from zimage_core.sampling.euler import sample, timestep


def theirs(shift):
    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


@pytest.mark.parametrize(("shift", "steps"), [(3.0, 8), (6.0, 50), (1.0, 1)])
def test_levels_steps_and_noise_are_those_of_diffusers(shift, steps):
    mine, other = FlowMatchEulerScheduler(shift), theirs(shift)
    grid = torch.linspace(1.0, 1 / steps, steps).tolist()
    mine.set_timesteps(steps, device="cpu", mu=0.7)
    other.set_timesteps(sigmas=grid, device="cpu")
    torch.testing.assert_close(mine.timesteps, other.timesteps, rtol=0, atol=1e-4)
    assert torch.equal(mine.sigmas, torch.tensor(mine.levels(steps)))
    mine.set_timesteps(sigmas=grid)
    assert mine.num_inference_steps == steps
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    for t, u in zip(mine.timesteps, other.timesteps, strict=True):
        v = torch.sin(x)
        x, y = mine.step(v, t, x).prev_sample, other.step(v, u, y, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    again = mine.timesteps[[0, -1]]
    noise = torch.randn_like(x)
    other.set_timesteps(sigmas=grid)
    torch.testing.assert_close(
        mine.scale_noise(x, again, noise), other.scale_noise(x, other.timesteps[[0, -1]], noise)
    )


def test_a_loop_by_hand_is_the_run():
    scheduler, start = FlowMatchEulerScheduler(), torch.randn(1, 4, 2, 2)
    wanted = sample(lambda x, t, _: torch.cos(x) * t, start, scheduler.levels(5))
    scheduler.set_timesteps(5)
    x = start
    for t in scheduler.timesteps:
        clean_minus_noise = torch.cos(x) * ((1000 - t) / 1000)
        x = scheduler.step(-clean_minus_noise, t, x, return_dict=False)[0]
    assert torch.equal(x, wanted)
    assert torch.equal(scheduler.timesteps, torch.stack([timestep(s) for s in scheduler.levels(5)[:-1]]))


def test_sigmas_is_a_tensor_and_the_method_of_before():
    scheduler = FlowMatchEulerScheduler()
    assert scheduler.sigmas(8) == scheduler.levels(8)
    assert len(scheduler.sigmas) == len(scheduler.timesteps) == len(scheduler) == 1000
    scheduler.set_timesteps(4)
    assert type(scheduler.sigmas[:-1] * 2) is torch.Tensor
    assert scheduler.sigmas(8) == scheduler.levels(8)


def test_a_walk_is_no_part_of_the_schedule():
    scheduler = FlowMatchEulerScheduler(6.0)
    scheduler.set_timesteps(2)
    assert scheduler == FlowMatchEulerScheduler(6.0)
    assert hash(scheduler) == hash(FlowMatchEulerScheduler(6.0))
    assert repr(scheduler) == "FlowMatchEulerScheduler(shift=6.0)"
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(other.timesteps, scheduler.timesteps)
        other.set_timesteps(3)
        assert len(scheduler.timesteps) == 2


def test_configs_go_both_ways(tmp_path):
    scheduler = FlowMatchEulerScheduler(6.0)
    assert scheduler.config.shift == scheduler.config["shift"] == 6.0
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).shift == 6.0
    assert FlowMatchEulerScheduler.from_config(theirs(4.0).config).shift == 4.0
    assert FlowMatchEulerScheduler.from_config(scheduler.config, shift=2.0).shift == 2.0
    for _ in range(2):
        scheduler.save_pretrained(tmp_path / "scheduler")
    assert FlowMatchEulerScheduler.from_pretrained(tmp_path, subfolder="scheduler") == scheduler
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler").shift == 6.0
    with pytest.raises(AttributeError, match="no 'beta'"):
        _ = scheduler.config.beta
    with pytest.raises(BadFile):
        FlowMatchEulerScheduler.from_pretrained(tmp_path)
    with pytest.raises(BadArgument, match="from_config: got a int"):
        FlowMatchEulerScheduler.from_config(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: s.set_timesteps(), BadArgument, "give num_inference_steps or sigmas"),
        (lambda s: s.set_timesteps(3, sigmas=[1.0, 0.5]), BadArgument, "got 2 sigmas for 3 steps"),
        (lambda s: s.set_timesteps(timesteps=[1000.0]), Unsupported, "give sigmas"),
        (lambda s: s.set_timesteps(0), BadArgument, "num_inference_steps"),
        (lambda s: s.step(torch.ones(1), 1000.0, torch.ones(1)), BadArgument, "call set_timesteps first"),
        (lambda s: (s.set_timesteps(2), s.step(torch.ones(1), 3, torch.ones(1))), BadArgument, "none of"),
        (lambda s: (s.set_timesteps(1), [s.step(torch.ones(1), 1000.0, torch.ones(1)) for _ in "ab"]),
         BadArgument, "all steps are done"),
        (lambda s: s.step(1, 2, 3, per_token_timesteps=[1]), Unsupported, "per_token_timesteps"),
        (lambda s: s.set_shift(6), Unsupported, "give shift= to the call"),
    ],
)  # fmt: skip
def test_a_wrong_step_is_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call(FlowMatchEulerScheduler())


def test_a_walk_may_begin_later_as_for_image_to_image():
    scheduler = FlowMatchEulerScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    scheduler.step(torch.ones(1), scheduler.timesteps[2], torch.ones(1))
    assert scheduler.step_index == 3
    assert scheduler.scale_model_input(scheduler.timesteps, None) is not None
