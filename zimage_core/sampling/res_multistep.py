"""RES of order 2 with the previous step in place of a second call: an exponential integrator.

dx/d(sigma) = (x - clean) / sigma, where clean is the estimate of the clean latents. With t = -log(sigma) the
part in x is solved exactly, and clean is taken as linear in t through this step and the one before.

Source: Zhang et al. 2023, arXiv 2308.02157, with phi functions as in section 3; the multistep form in t is
that of ComfyUI's `res_multistep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from zimage_core.sampling.euler import Denoiser, StepEnd, follow


def sample(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """N steps with N calls of the network; the first and the last are steps of order 1.

    Arguments and errors are those of `euler.follow`.
    """
    before: Tensor | None = None  # the estimate of the clean latents in the step before

    def advance(step: int, x: Tensor, v: Tensor) -> Tensor:
        nonlocal before
        now, then = sigmas[step], sigmas[step + 1]
        clean, last = x - now * v, before
        before = clean
        kept = then / now
        if last is None or then == 0:
            return kept * x + (1 - kept) * clean
        h, past = -math.log(kept), math.log(sigmas[step - 1] / now)
        # with clean(t + s) = clean + s (clean - last) / past, the second integral is h - 1 + exp(-h)
        slope = (clean - last) / past
        return kept * x + (1 - kept) * clean + (h - 1 + kept) * slope

    return follow(denoise, advance, latents, sigmas, on_step_end, stop)
