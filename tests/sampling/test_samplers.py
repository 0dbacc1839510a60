"""Each sampler on a flow whose velocity and solution are known: Gaussian data.

Data N(mean, spread^2) and noise N(0, 1) make x at level s Gaussian with mean (1 - s) mean and variance
(1 - s)^2 spread^2 + s^2, so the velocity is linear in x, and the flow keeps (x - mean) / deviation.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from zimage_core.errors import NonFinite
from zimage_core.sampling.noise import StepNoise
from zimage_core.sampling.samplers import SAMPLERS, find
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

MEAN = 0.7
SPREADS = torch.tensor([0.2, 0.5, 0.9, 1.6], dtype=torch.float64)[None, :, None, None]
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]
SIGMAS = FlowMatchEulerScheduler().levels(8)


def deviation(sigma, spread):
    return ((1 - sigma) ** 2 * spread**2 + sigma**2) ** 0.5


def gaussian(sigmas, spread=SPREADS, calls=None):
    def denoise(x, time, step):
        if calls is not None:
            calls.append((step, float(time)))
        s = sigmas[step]
        slope = (s - (1 - s) * spread**2) / deviation(s, spread) ** 2
        return MEAN - slope * (x - (1 - s) * MEAN)

    return denoise


def drawn(shape=(2, 4, 6, 6), seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(name, denoise, x, sigmas, seeds=None, **more):
    if SAMPLERS[name].stochastic:
        more["noise"] = StepNoise(seeds or range(len(x)))
    return find(name)(denoise, x, sigmas, **more)


def error(name, sigmas):
    """RMS distance from the exact solution between the first and the last level."""
    start = (1 - sigmas[0]) * MEAN + deviation(sigmas[0], SPREADS) * drawn()
    want = (1 - sigmas[-1]) * MEAN + deviation(sigmas[-1], SPREADS) * drawn()
    return float((run(name, gaussian(sigmas), start, sigmas) - want).square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("heun", 2), ("res_multistep", 2), ("dpmpp_2m", 2)]
)
def test_order_of_convergence(name, order):
    """Error against steps on a log-log slope, away from level 0, where every step is long in log(sigma)."""
    counts = (64, 128, 256)
    errors = [error(name, torch.linspace(0.95, 0.1, n + 1, dtype=torch.float64).tolist()) for n in counts]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    # the next term of the expansion moves the slope by a few percent at these counts
    assert all(abs(slope - order) < 0.1 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("name", ["heun", "res_multistep", "dpmpp_2m"])
def test_on_a_whole_schedule_order_two_is_closer_than_euler(name):
    for steps in (16, 64):
        sigmas = FlowMatchEulerScheduler().levels(steps)
        assert error(name, sigmas) < error("euler", sigmas) / 1.3


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "euler_ancestral"])
def test_stochastic_samplers_keep_mean_and_variance(name):
    x = drawn((1, 1, 300, 300), dtype=torch.float32)
    sigmas = FlowMatchEulerScheduler().levels(400)
    out = run(name, gaussian(sigmas, 0.4), x, sigmas)
    # 90,000 values: the mean is known to 0.4 / 300, the deviation to 0.25 %; the rest is the steps' own error
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.006)
    assert float(out.std()) == pytest.approx(0.4, rel=0.025)


def test_lcm_keeps_mean_and_variance_with_a_consistency_function():
    sigmas = FlowMatchEulerScheduler().levels(8)

    def denoise(x, time, step):
        s = sigmas[step]
        clean = MEAN + 0.4 * (x - (1 - s) * MEAN) / deviation(s, 0.4)
        return (clean - x) / s

    out = run("lcm", denoise, drawn((1, 1, 300, 300), dtype=torch.float32), sigmas)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.006)
    assert float(out.std()) == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_is_asked_at_levels_of_the_grid_only(name):
    """`ZImageTransformer.prepare` knows the times of sigmas[:-1]."""
    calls = []
    run(name, gaussian(SIGMAS, 1.0, calls), drawn(dtype=torch.float32), SIGMAS)
    assert all(time == pytest.approx(1 - SIGMAS[step], abs=1e-6) for step, time in calls)
    assert {step for step, _ in calls} == set(range(8))
    assert len(calls) == (15 if name == "heun" else 8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_network_reaches_the_image(name):
    clean = drawn(seed=1)
    for sigmas in (SIGMAS, (1.0, 0.0), SIGMAS[5:]):
        start = (1 - sigmas[0]) * clean + sigmas[0] * drawn()

        def denoise(x, time, step, sigmas=sigmas):
            return (clean - x) / sigmas[step]

        torch.testing.assert_close(run(name, denoise, start, sigmas), clean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_reported_and_can_be_stopped(name):
    seen = []

    def on_step_end(step, timestep, latents):
        seen.append((step, float(timestep)))
        return latents

    run(name, gaussian(SIGMAS, 1.0), drawn(), SIGMAS, on_step_end=on_step_end, stop=lambda: len(seen) == 3)
    assert seen == [(i, pytest.approx(1000 * SIGMAS[i])) for i in range(3)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_stay_float32_and_the_callers_are_not_modified(name):
    start = torch.ones(2, 1, 2, 2)
    assert run(name, lambda x, t, i: x.float(), start, SIGMAS).dtype == torch.float32
    assert torch.equal(start, torch.ones(2, 1, 2, 2))


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_is_an_error_that_names_the_step(name):
    def denoise(x, time, step):
        return torch.full_like(x, math.nan) if step == 3 else torch.zeros_like(x)

    with pytest.raises(NonFinite, match=r"step [34] of 8"):  # Heun asks for level 3 in the third step too
        run(name, denoise, torch.ones(1, 1, 2, 2), SIGMAS)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_depends_on_the_seed_and_not_on_the_place_in_a_batch(name):
    starts = torch.cat([drawn((1, 1, 4, 4), seed, torch.float32) for seed in (7, 8)])
    both = run(name, gaussian(SIGMAS, 1.0), starts, SIGMAS, [7, 8])
    alone = run(name, gaussian(SIGMAS, 1.0), starts[1:], SIGMAS, [8])
    assert torch.equal(both[1:], alone)
    other = run(name, gaussian(SIGMAS, 1.0), starts[1:], SIGMAS, [9])
    assert not torch.equal(other, alone)


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 5, 2**64 - 1])
def test_step_noise_is_none_of_what_the_seed_itself_draws(seed):
    generator, noise = torch.Generator().manual_seed(seed), StepNoise([seed])
    own = torch.stack([torch.randn(3, 40, 40, generator=generator).flatten() for _ in range(4)])
    steps = torch.stack([noise(torch.zeros(1, 3, 40, 40)).flatten() for _ in range(4)])
    # the correlation of 4,800 independent numbers is below 5 / sqrt(4,800) = 0.07
    assert float(torch.corrcoef(torch.cat((own, steps)))[:4, 4:].abs().max()) < 0.07
    assert noise(torch.zeros(1, 2, 2, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parity
def test_dpmpp_2m_is_that_of_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    theirs.set_timesteps(9)
    sigmas = [float(s) for s in theirs.sigmas]
    x = start = drawn(dtype=torch.float32)
    denoise = gaussian(sigmas)
    for step, time in enumerate(theirs.timesteps):
        x = theirs.step(-denoise(x.double(), time, step).float(), time, x).prev_sample
    ours = run("dpmpp_2m", denoise, start, sigmas)
    # float32 sums of numbers below 5, in another order
    torch.testing.assert_close(ours, x.to(ours.dtype), rtol=0, atol=2e-5)
