"""The result of a comparison of two models: errors of each image, step and block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from zimage_core.study.blocks import BlockError
from zimage_core.study.metrics import decibels


@dataclass(frozen=True)
class ImagePair:
    """The images of both models for one prompt and seed.

    Args:
        prompt: The prompt.
        seed: Seed of the noise.
        psnr: Peak signal-to-noise ratio in dB; infinite if the images are equal.
        ssim: Structural similarity, mean over the channels.
        mean_square: Mean squared error of values from 0 to 1.
        a: Image of A, uint8 [H, W, 3].
        b: Image of B, uint8 [H, W, 3].
    """

    prompt: str
    seed: int
    psnr: float
    ssim: float
    mean_square: float
    a: np.ndarray[Any, Any] = field(repr=False)
    b: np.ndarray[Any, Any] = field(repr=False)


@dataclass(frozen=True)
class StepError:
    """Errors of one step over all images.

    Args:
        step: Number of the step, from 0.
        sigma: Noise level at the beginning of the step.
        velocity: |v_B - v_A| / |v_A| with A's latents as input of both (teacher-forced), including guidance.
        latents: |x_B - x_A| / |x_A| after the step, when both run freely.
    """

    step: int
    sigma: float
    velocity: float
    latents: float


@dataclass(frozen=True)
class Comparison:
    """The errors of model B against model A.

    Args:
        labels: Names of A and B.
        images: The images, in the order of prompts, and of seeds for each prompt.
        steps: Errors of each step; empty if A and B have different noise levels.
        blocks: Errors of the blocks in the first image; empty if they were not requested, or if the networks
            have different sizes.
        settings: Settings of the first image of A and of B.
        files: Component -> name, size and hash of its file, for A and for B.
        seconds: Time of all runs of A and of B.
    """

    labels: tuple[str, str]
    images: tuple[ImagePair, ...]
    steps: tuple[StepError, ...]
    blocks: tuple[BlockError, ...]
    settings: tuple[Mapping[str, Any], Mapping[str, Any]]
    files: tuple[Mapping[str, Any], Mapping[str, Any]]
    seconds: tuple[float, float]

    @property
    def psnr(self) -> float:
        """PSNR in dB of the mean squared error over all images."""
        return decibels(sum(p.mean_square for p in self.images) / len(self.images))

    @property
    def ssim(self) -> float:
        """Mean SSIM of the images."""
        return sum(p.ssim for p in self.images) / len(self.images)

    @property
    def velocity(self) -> float | None:
        """Root mean square of the velocity errors of the steps; None if they could not be compared."""
        if not self.steps:
            return None
        return math.sqrt(sum(s.velocity**2 for s in self.steps) / len(self.steps))

    def to_json(self) -> dict[str, Any]:
        """All numbers, without the images; the infinite PSNR of equal images is None."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        images = [
            {"prompt": p.prompt, "seed": p.seed, "psnr": plain(p.psnr), "ssim": p.ssim} for p in self.images
        ]
        return {
            "labels": list(self.labels),
            "psnr": plain(self.psnr),
            "ssim": self.ssim,
            "velocity": self.velocity,
            "images": images,
            "steps": [asdict(step) for step in self.steps],
            "blocks": [{k: plain(v) if isinstance(v, float) else v for k, v in asdict(b).items()}
                       for b in self.blocks],
            "settings": [dict(each) for each in self.settings],
            "files": [dict(each) for each in self.files],
            "seconds": list(self.seconds),
        }  # fmt: skip
