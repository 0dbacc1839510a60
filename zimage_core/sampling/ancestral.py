"""Samplers that step to less noise than the next level has and add the rest anew.

Sources: Karras et al. 2022, arXiv 2206.00364 (noise added between deterministic steps), in the form for
rectified flow of ComfyUI's `euler_ancestral` with eta = 1; Luo et al. 2023, arXiv 2310.04378, section 3
(multistep sampling of a latent consistency model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from zimage_core.sampling.euler import Denoiser, StepEnd, follow
from zimage_core.sampling.noise import Noise


def euler_ancestral(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    noise: Noise,
) -> Tensor:
    """Euler's step to below the next noise level, then noise up to it; the last step adds none.

    `noise` is the source of the noise; the other arguments are those of `euler.follow`.
    """

    def advance(step: int, x: Tensor, v: Tensor) -> Tensor:
        now, then = sigmas[step], sigmas[step + 1]
        if then == 0:
            return x - now * v
        down = then * then / now
        # scaled so that the signal has the share of the next level, which leaves this much noise to add
        scale = (1 - then) / (1 - down)
        added = math.sqrt(max(then**2 - (scale * down) ** 2, 0.0))
        return scale * (x + (down - now) * v) + added * noise(x)

    return follow(denoise, advance, latents, sigmas, on_step_end, stop)


def lcm(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    noise: Noise,
) -> Tensor:
    """The estimate of the clean latents, mixed with new noise to the next level.

    For networks distilled to a consistency function, whose estimate is a sample and not a mean; any other
    gives smooth images. `noise` is the source of the noise; the other arguments are those of `euler.follow`.
    """

    def advance(step: int, x: Tensor, v: Tensor) -> Tensor:
        clean, then = x - sigmas[step] * v, sigmas[step + 1]
        return clean if then == 0 else (1 - then) * clean + then * noise(x)

    return follow(denoise, advance, latents, sigmas, on_step_end, stop)
