"""Euler's method from noise to image, for any callable that estimates clean - noise; every sampler's loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zimage_core.errors import NonFinite

Denoiser = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(latents [B, C, h, w] float32, time [] float32, step) -> estimate of clean - noise [B, C, h, w] float32."""

StepEnd = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, timestep [] float32 in 0..1000, latents) -> latents for the next step."""


def timestep(sigma: float) -> torch.Tensor:
    """Noise level as the timestep of schedulers and callbacks: 1000 sigma, float32 scalar."""
    return torch.tensor(sigma, dtype=torch.float32) * 1000


def network_time(sigma: float) -> torch.Tensor:
    """Noise level as the network's time, 0 for noise and 1 for a clean image: float32 scalar.

    Computed as (1000 - 1000 sigma) / 1000 in float32 because diffusers does so; 1 - sigma can differ in the
    last bit, which the network multiplies by 1000 before it takes sines.
    """
    return (1000 - timestep(sigma)) / 1000


def velocity(denoise: Denoiser, latents: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
    """d(latents)/d(sigma) at noise level sigma; converts between the sampler's and the network's conventions.

    The network differs from the sampler in two signs. Its time runs from 0 at pure noise to 1 at the clean
    image, so its input is 1 - sigma. Its output is clean - noise, but the path x = (1 - sigma) clean + sigma
    noise has the derivative noise - clean, so its output is negated.
    """
    return -denoise(latents, network_time(sigma), step)


Advance = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, latents at its noise level, velocity there) -> latents at the next noise level."""


def finite(v: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """The velocity itself; NonFinite names the step if it holds NaN or infinity (one reduction)."""
    if not bool(torch.isfinite(v).all()):
        raise NonFinite(f"step {step + 1} of {steps}: the network's prediction holds NaN or infinity")
    return v


def follow(
    denoise: Denoiser,
    advance: Advance,
    latents: torch.Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """The loop of every sampler: evaluate the velocity, advance by one noise level, report.

    Args:
        denoise: Function that estimates clean - noise, as `Denoiser` describes.
        advance: The sampler's rule of one step.
        latents: Starting point at noise level sigmas[0]; not modified.
        sigmas: Falling noise levels, one more than there are steps.
        on_step_end: Called after each step; may replace the latents.
        stop: Called after each step; True ends the run with the latents so far.

    Shape:
        latents [B, C, h, w] float32 -> [B, C, h, w] float32. The sums are float32 for every dtype of the
        network, because adding small steps in half precision would lose too many digits.

    Raises:
        NonFinite: A velocity holds NaN or infinity; the message names the step.
    """
    steps = len(sigmas) - 1
    for step in range(steps):
        v = finite(velocity(denoise, latents, sigmas[step], step), step, steps)
        latents = advance(step, latents, v)
        if on_step_end is not None:
            latents = on_step_end(step, timestep(sigmas[step]), latents)
        if stop is not None and stop():
            break
    return latents


def sample(
    denoise: Denoiser,
    latents: torch.Tensor,
    sigmas: Sequence[float],
    on_step_end: StepEnd | None = None,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Follow the velocity from the first noise level to the last; arguments and errors are `follow`'s."""

    def advance(step: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return x + (sigmas[step + 1] - sigmas[step]) * v

    return follow(denoise, advance, latents, sigmas, on_step_end, stop)
