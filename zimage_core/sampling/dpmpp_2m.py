"""DPM-Solver++ (2M): order 2 from this step and the one before.

Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2, with alpha = 1 - sigma, which is the path of flow
matching. Differences are taken in lambda = log(alpha / sigma). At pure noise lambda is minus infinity: the
second step then has nothing to extrapolate from and is one of order 1, like the first and the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from zimage_core.sampling.euler import Denoiser, StepEnd, follow


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma): infinite at 0, minus infinity at 1."""
    if sigma <= 0:
        return math.inf
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def step_ratio(sigmas: Sequence[float], step: int) -> float:
    """h / h_last, this step's length in lambda over the last one's; 0 where one of them is infinite."""
    if step == 0 or sigmas[step + 1] <= 0 or sigmas[step - 1] >= 1:
        return 0.0
    here = log_snr(sigmas[step])
    return (log_snr(sigmas[step + 1]) - here) / (here - log_snr(sigmas[step - 1]))


def extrapolation(sigmas: Sequence[float]) -> Callable[[int, Tensor], Tensor]:
    """(step, clean latents as estimated) -> those at its middle in lambda, by the step before."""
    before: Tensor | None = None

    def at(step: int, clean: Tensor) -> Tensor:
        nonlocal before
        last, before = before, clean
        return clean if last is None else clean + 0.5 * step_ratio(sigmas, step) * (clean - last)

    return at


def sample(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tensor:
    """N steps with N calls of the network. Arguments and errors are those of `euler.follow`."""
    extrapolated = extrapolation(sigmas)

    def advance(step: int, x: Tensor, v: Tensor) -> Tensor:
        estimate = extrapolated(step, x - sigmas[step] * v)
        kept = sigmas[step + 1] / sigmas[step]
        # alpha (1 - exp(-h)) is 1 - kept on this path
        return kept * x + (1 - kept) * estimate

    return follow(denoise, advance, latents, sigmas, on_step_end, stop)
