"""The loop follows a known velocity exactly, with the network's reversed time and sign."""

import pytest
import torch

from zimage_core.errors import NonFinite
from zimage_core.sampling.euler import sample, velocity
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

SIGMAS = FlowMatchEulerScheduler().sigmas(8)


def test_time_runs_backwards_and_the_sign_is_flipped():
    seen = []

    def denoise(latents, time, step):
        seen.append(float(time))
        assert time.dtype == torch.float32
        return torch.ones_like(latents)

    assert torch.equal(velocity(denoise, torch.zeros(1, 1, 1, 1), 0.75, 0), -torch.ones(1, 1, 1, 1))
    assert seen == [0.25]


def test_a_perfect_network_reaches_the_image_whatever_the_steps():
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for sigmas in (SIGMAS, (1.0, 0.0), FlowMatchEulerScheduler(6.0).sigmas(50)):
        got = sample(lambda x, t, i: clean - noise, noise, sigmas)
        # 50 additions of float32 numbers near 3
        torch.testing.assert_close(got, clean, rtol=0, atol=5e-6)


def test_latents_stay_float32_and_the_callers_are_not_modified():
    start = torch.ones(1, 1, 2, 2)
    got = sample(lambda x, t, i: x.float(), start, SIGMAS)
    assert got.dtype == torch.float32
    assert torch.equal(start, torch.ones(1, 1, 2, 2))


def test_step_end_sees_every_step_and_may_replace_the_latents():
    calls = []

    def on_step_end(step, timestep, latents):
        calls.append((step, float(timestep)))
        return torch.full_like(latents, 7.0) if step == 7 else latents

    got = sample(lambda x, t, i: x, torch.ones(1, 1, 2, 2), SIGMAS, on_step_end)
    assert [c[0] for c in calls] == list(range(8))
    assert [c[1] for c in calls] == pytest.approx([1000 * s for s in SIGMAS[:-1]])
    assert torch.equal(got, torch.full((1, 1, 2, 2), 7.0))


def test_stop_ends_the_run_with_the_latents_so_far():
    ran = []

    def denoise(latents, time, step):
        ran.append(step)
        return latents

    got = sample(denoise, torch.ones(1, 1, 2, 2), SIGMAS, stop=lambda: len(ran) == 3)
    assert ran == [0, 1, 2]
    assert torch.equal(got, sample(denoise, torch.ones(1, 1, 2, 2), SIGMAS[:4]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_an_error_that_names_the_step(poison):
    def denoise(latents, time, step):
        out = torch.zeros_like(latents)
        if step == 3:
            out[0, 0, 1, 1] = poison
        return out

    with pytest.raises(NonFinite, match="step 4 of 8"):
        sample(denoise, torch.ones(1, 1, 2, 2), SIGMAS)
