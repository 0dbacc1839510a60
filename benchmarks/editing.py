"""What it costs to begin from an image: the VAE's encoder against its decoder and a step, on one thread.

python -m benchmarks.editing [--px 256]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from time import thread_time
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from benchmarks.report import arguments, write
from tests.helpers.parity import autoencoder_pair
from zimage_core import ZImagePipeline
from zimage_core.config import AutoencoderConfig
from zimage_core.editing import edit
from zimage_core.editing.images import read_image
from zimage_core.models.autoencoder import Autoencoder


def seconds(*calls: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of the thread for each call; the calls alternate."""
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, found, strict=True):
            start = thread_time()
            call()
            times.append(thread_time() - start)
    return [median(times) for times in found]


def coder(vae: Autoencoder, px: int, repeats: int, tile: int | None = None) -> dict[str, float]:
    """Encoding and decoding of one image of px x px."""
    x, z = torch.rand(1, 3, px, px) * 2 - 1, torch.randn(1, 16, px // 8, px // 8)
    encode, decode, tiled = seconds(
        lambda: vae.moments(x),
        lambda: vae.decode(z),
        lambda: vae.moments(x, tile or px // 16),
        repeats=repeats,
    )
    return {"px": px, "encode": encode, "decode": decode, "encode_in_tiles": tiled}


def embedded(repeats: int) -> dict[str, Any]:
    """Seconds of the embedded model at 80 x 80: a step, and what an edit adds to a run of as many steps."""
    pipe = ZImagePipeline.from_default()
    image = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    mask = np.zeros((80, 80), np.uint8)
    mask[20:60, 20:60] = 255
    prompt = "a red circle on a white background"
    plain, edited, masked, more, read = seconds(
        lambda: pipe(prompt, num_inference_steps=5, seed=1),
        lambda: pipe(prompt, image=image, num_inference_steps=8, strength=0.6, seed=1),  # five steps as well
        lambda: pipe(prompt, image=image, mask_image=mask, num_inference_steps=8, strength=0.6, seed=1),
        lambda: pipe(prompt, num_inference_steps=6, seed=1),
        lambda: read_image(image, "image", 80, 80),
        repeats=repeats,
    )
    return {
        "five_steps": plain,
        "img2img_of_five_steps": edited,
        "inpaint_of_five_steps": masked,
        "step": more - plain,
        "reading_the_image": read,
        **{f"vae_{name}": value for name, value in coder(pipe.vae, 80, repeats).items()},
    }


def canvas(fill: str, pixels: torch.Tensor, margins: Any) -> torch.Tensor:
    """Another canvas than `grown`: noise or grey around the pixels."""
    large = functional.pad(pixels, margins.order, value=0.5)
    if fill == "noise":
        drawn = torch.rand(large.shape, generator=torch.Generator().manual_seed(0))
        inside = functional.pad(torch.ones_like(pixels), margins.order)
        large = torch.where(inside > 0, large, drawn)
    return large


def seams() -> dict[str, float]:
    """Mean step of 8-bit values over the seam of outpainting, by its canvas, and in whole images."""
    pipe = ZImagePipeline.from_default()
    prompts = [
        f"a {size} {colour} {shape} on a {ground} background"
        for size in ("small", "big")
        for colour, shape, ground in (
            ("red", "circle", "white"), ("blue", "star", "yellow"), ("green", "square", "black"),
            ("yellow", "cross", "blue"), ("white", "ring", "red"),
        )
    ]  # fmt: skip

    def step(image: Any) -> float:
        pixels = np.asarray(image).astype(float)
        return float(np.abs(pixels[:, 32] - pixels[:, 31]).mean())

    whole = [pipe(prompt, seed=i).images[0] for i, prompt in enumerate(prompts)]
    found = {"whole image": mean(step(image) for image in whole)}
    for fill in ("edge", "noise", "grey"):
        other = edit.grown if fill == "edge" else partial(canvas, fill)
        with mock.patch.object(edit, "grown", other):
            grown = [
                pipe.outpaint(prompt, image.crop((32, 0, 80, 80)), (32, 0, 0, 0), seed=100 + i).images[0]
                for i, (prompt, image) in enumerate(zip(prompts, whole, strict=True))
            ]
        found[fill] = mean(step(image) for image in grown)
    return found


@torch.no_grad()
def main() -> None:
    """The embedded model, and the VAE of full size with random weights."""
    parser = arguments(__doc__, "editing.json")
    parser.add_argument("--px", type=int, default=256, help="side of the full-size VAE's image")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, full = autoencoder_pair(AutoencoderConfig(), 0.01)
    figures = {
        "unit": "seconds of the thread, median",
        "repeats": args.repeats,
        "embedded_80": embedded(args.repeats),
        "full_size_vae": coder(full, args.px, 3),
        "step_over_the_seam_of_outpainting": seams(),
    }
    print(json.dumps(figures, indent=1))
    write(args.out, figures)


if __name__ == "__main__":
    main()
