"""What a comparison of two models found, picture by picture, step by step, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from zimage_core.study.blocks import BlockError
from zimage_core.study.metrics import decibels


@dataclass(frozen=True)
class PicturePair:
    """One prompt and seed, drawn by both.

    Args:
        prompt: What was asked.
        seed: Of the noise.
        psnr: In dB; infinite if the pictures are equal.
        ssim: Mean over the channels.
        mean_square: Mean squared error of values from 0 to 1.
        a: Picture uint8 [H, W, 3] of A.
        b: Of B.
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
    """Of one step, over all pictures.

    Args:
        step: From 0.
        sigma: Noise level at which the network was asked.
        velocity: |v_B - v_A| / |v_A| where both saw A's latents; guidance included.
        latents: |x_B - x_A| / |x_A| after the step, each on its own way.
    """

    step: int
    sigma: float
    velocity: float
    latents: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; every error is B's, measured against A.

    Args:
        labels: Of A and B.
        pictures: In the order of prompts, seeds within.
        steps: Empty where the two have other noise levels.
        blocks: Of the first picture; empty where not asked for, or the networks differ in size.
        settings: Of A's and B's first picture.
        files: Component -> name, size and hash of its file, for A and B.
        seconds: That A and B took, all runs.
    """

    labels: tuple[str, str]
    pictures: tuple[PicturePair, ...]
    steps: tuple[StepError, ...]
    blocks: tuple[BlockError, ...]
    settings: tuple[Mapping[str, Any], Mapping[str, Any]]
    files: tuple[Mapping[str, Any], Mapping[str, Any]]
    seconds: tuple[float, float]

    @property
    def psnr(self) -> float:
        """Of the mean squared error of all pictures."""
        return decibels(sum(p.mean_square for p in self.pictures) / len(self.pictures))

    @property
    def ssim(self) -> float:
        """Mean over pictures."""
        return sum(p.ssim for p in self.pictures) / len(self.pictures)

    @property
    def velocity(self) -> float | None:
        """Root mean square of the velocity errors of the steps; None where they could not be compared."""
        if not self.steps:
            return None
        return math.sqrt(sum(s.velocity**2 for s in self.steps) / len(self.steps))

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels; a PSNR of equal pictures is null."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        pictures = [
            {"prompt": p.prompt, "seed": p.seed, "psnr": plain(p.psnr), "ssim": p.ssim} for p in self.pictures
        ]
        return {
            "labels": list(self.labels),
            "psnr": plain(self.psnr),
            "ssim": self.ssim,
            "velocity": self.velocity,
            "pictures": pictures,
            "steps": [asdict(step) for step in self.steps],
            "blocks": [{k: plain(v) if isinstance(v, float) else v for k, v in asdict(b).items()}
                       for b in self.blocks],
            "settings": [dict(each) for each in self.settings],
            "files": [dict(each) for each in self.files],
            "seconds": list(self.seconds),
        }  # fmt: skip
