"""DPM-Solver++ (2M) for the stochastic equation, with as much noise as keeps every marginal (eta = 1).

Source: Lu et al. 2022, arXiv 2211.01095, on SDE-DPM-Solver++ (2M), in the midpoint form of k-diffusion; alpha
= 1 - sigma as in `dpmpp_2m`. Where the first noise level is 1, the first step draws wholly new noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from zimage_core.sampling.dpmpp_2m import extrapolation
from zimage_core.sampling.euler import Denoiser, StepEnd, follow
from zimage_core.sampling.noise import Noise


def sample(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    noise: Noise,
) -> Tensor:
    """N steps with N calls of the network and noise added in all but the last.

    Args:
        denoise: As for `euler.follow`, like the arguments that are not listed.
        latents: Starting point.
        sigmas: Noise levels.
        on_step_end: Called after each step.
        stop: Called after each step.
        noise: Source of the noise.
    """
    extrapolated = extrapolation(sigmas)

    def advance(step: int, x: Tensor, v: Tensor) -> Tensor:
        now, then = sigmas[step], sigmas[step + 1]
        estimate = extrapolated(step, x - now * v)
        shrink = then * (1 - now) / (now * (1 - then))  # exp(-h)
        x = shrink * then / now * x + (1 - then) * (1 - shrink**2) * estimate
        return x if then == 0 else x + then * math.sqrt(1 - shrink**2) * noise(x)

    return follow(denoise, advance, latents, sigmas, on_step_end, stop)
