"""Heun's method of order 2: an Euler step, then the mean of the velocities at both its ends.

Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1 without added noise; on the path of flow matching
the derivative is the velocity itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from zimage_core.sampling.euler import Denoiser, StepEnd, finite, follow, velocity


def sample(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """N steps with 2 N - 1 calls of the network: the last step, to noise level 0, is one of Euler.

    The second call is at the next noise level, so the network is asked at no level outside of `sigmas`.
    Arguments and errors are those of `euler.follow`.
    """
    steps = len(sigmas) - 1

    def advance(step: int, x: Tensor, v: Tensor) -> Tensor:
        change = sigmas[step + 1] - sigmas[step]
        ahead = x + change * v
        if step + 1 == steps:
            return ahead
        after = finite(velocity(denoise, ahead, sigmas[step + 1], step + 1), step, steps)
        return x + change * 0.5 * (v + after)

    return follow(denoise, advance, latents, sigmas, on_step_end, stop)
