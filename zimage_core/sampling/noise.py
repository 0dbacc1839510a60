"""Starting noise, drawn on the CPU: a seed gives the same noise on every device and in every batch.

The image is the same to the bit on one machine with one number of threads. Other numbers of threads and other
instruction sets sum in another order: 0.005 to 0.01 % of its 8-bit values then differ by 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zimage_core.errors import BadArgument

MAX_SEED = 2**64 - 1
STEP_KEY = 0x9E3779B9
"""Changes a seed for `StepNoise`, in the lower 32 bits, the only ones that torch's CPU generator uses."""

Noise = Callable[[torch.Tensor], torch.Tensor]
"""latents [B, ...] -> fresh Gaussian noise of their shape, dtype and device."""


def fresh_seed() -> int:
    """A seed of 32 bits for a run that was given none.

    It comes from torch's global generator, so that `torch.manual_seed` makes it reproducible. 32 bits are
    short enough to copy by hand from an image's settings.
    """
    return int(torch.randint(0, 2**32, ()).item())


def from_seeds(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """Noise [B, ...] float32; each image is drawn from a generator with its own seed."""
    members = [torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(members)


def from_generator(
    shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator]
) -> torch.Tensor:
    """Noise [B, ...] float32 on the CPU, drawn exactly as diffusers' `randn_tensor` draws it.

    One generator (or a list of one) draws the whole batch at once; with a list of B, each draws its own
    image. A generator of another device draws on that device, because it gives other numbers than the CPU's.

    Raises:
        BadArgument: The value is no generator, or a list whose length is neither 1 nor B.
    """
    chosen: list[torch.Generator] = list(generator) if isinstance(generator, (list, tuple)) else [generator]  # type: ignore[list-item]
    if not all(isinstance(g, torch.Generator) for g in chosen):
        raise BadArgument("generator: a torch.Generator or a list of them is needed")
    if len(chosen) == 1:
        return torch.randn(tuple(shape), generator=chosen[0], device=chosen[0].device).cpu()
    if len(chosen) != shape[0]:
        raise BadArgument(f"generator: got {len(chosen)} for {shape[0]} images; give one, or one an image")
    one = (1, *shape[1:])
    return torch.cat([torch.randn(one, generator=g, device=g.device).cpu() for g in chosen])


class StepNoise:
    """Noise for the steps of a stochastic sampler, drawn on the CPU; each image draws its own.

    It differs from what the seeds themselves draw, the starting noise and the sample of an encoded image, and
    does not depend on the other images of the batch.

    Args:
        seeds: Seed of each image.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed ^ STEP_KEY) for seed in seeds]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Noise of the shape of the latents [B, ...], in their dtype and on their device."""
        shape = tuple(latents.shape[1:])
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators]).to(latents)


def drawn_seeds(
    count: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> tuple[int, ...]:
    """Seeds of images whose starting noise has none: from its generators, else from torch's global one."""
    if generator is None:
        return tuple(fresh_seed() for _ in range(count))
    each: list[torch.Generator] = list(generator) if isinstance(generator, (list, tuple)) else [generator]  # type: ignore[list-item]
    each = each * count if len(each) == 1 else each
    return tuple(int(torch.randint(0, 2**32, (), generator=g, device=g.device)) for g in each)
