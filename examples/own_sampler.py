"""A sampler of your own (Adams-Bashforth), in the denoising loop by hand, beside Euler.

python examples/own_sampler.py [--model FOLDER] [--steps N]
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from zimage_core import ZImagePipeline

Velocity = Callable[[torch.Tensor, float], torch.Tensor]
"""(latents [16, h, w], noise level) -> noise - clean, the derivative of the latents."""


def euler(velocity: Velocity, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """The usual sampler: straight on."""
    for now, then in pairwise(sigmas):
        x = x + (then - now) * velocity(x, now)
    return x


def adams_bashforth(velocity: Velocity, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Order 2 from the last two velocities, for steps of different lengths."""
    last, length = None, 1.0
    for now, then in pairwise(sigmas):
        v, change = velocity(x, now), then - now
        ahead = v if last is None else v + 0.5 * change / length * (v - last)
        x, last, length = x + change * ahead, v, change
    return x


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print how far each sampler's latents are from those of four times as many steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default", help="folder or repository (default: embedded)")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)

    pipe = ZImagePipeline.from_pretrained(args.model)
    network, side = pipe.transformer, pipe.sample_size // 8
    caption = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False)[0][0]
    noise = torch.randn(16, side, side, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return -network([x[:, None]], torch.tensor([1 - sigma]), [caption])[0][:, 0]

    exact, errors = euler(velocity, noise, pipe.scheduler.levels(4 * args.steps)), {}
    for sampler in (euler, adams_bashforth):
        x = sampler(velocity, noise, pipe.scheduler.levels(args.steps))
        errors[sampler.__name__] = float((x - exact).norm() / exact.norm())
        print(f"{sampler.__name__}: {errors[sampler.__name__]:.2%} from four times as many steps")
    return errors


if __name__ == "__main__":
    main()
