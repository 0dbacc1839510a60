"""diffusers' image-to-image and inpainting pipelines beside ours, and how far their latents are apart.

Used by tests/editing/test_parity.py (which asserts) and benchmarks/parity.py (which writes the table).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from tests.helpers import pipeline_parity
from tests.helpers.parity import FLOAT32, Difference, Outputs, compare
from tests.helpers.pipeline_parity import LATENTS, PROMPT
from zimage_core import ZImagePipeline

H, W = 32, 48
KINDS = ("img2img", "inpaint")
CASES: dict[str, dict[str, Any]] = {
    "strength 0.6": {},
    "strength 0.3": {"strength": 0.3},
    "strength 1": {"strength": 1.0},
    "one step of eight": {"strength": 0.01},
    "five steps, 0.5": {"num_inference_steps": 5, "strength": 0.5},
    "own sigmas": {"sigmas": [1.0, 0.7, 0.4, 0.2]},
    "guidance 4": {"guidance_scale": 4.0, "negative_prompt": "blue", "strength": 0.7},
    "cfg_truncation": {"guidance_scale": 4.0, "cfg_truncation": 0.5, "cfg_normalization": 0.7},
    "two prompts": {"prompt": ["a", "b c d"], "guidance_scale": 2.0},
    "two images a prompt": {"num_images_per_prompt": 2},
    "two generators": {"prompt": ["a", "b"], "generator": 2},
    "two images": {"prompt": ["a", "b"], "image": [0, 1]},
    "two images and generators": {"prompt": ["a", "b"], "image": [0, 1], "generator": 2},
    "another size": {"image": (37, 61), "height": None, "width": None},
    "given latents": {"latents": True, "strength": 0.4},
}


class Pair(NamedTuple):
    """diffusers' pipelines by the names of `KINDS`, and ours."""

    theirs: dict[str, Any]
    ours: ZImagePipeline


def make_pairs(where: Path) -> dict[torch.dtype, Pair]:
    """One checkpoint in float32 and in float64."""
    import diffusers

    classes = (diffusers.ZImageImg2ImgPipeline, diffusers.ZImageInpaintPipeline)
    found, pairs = {}, pipeline_parity.make_pairs(where, 3.0)
    for dtype, (theirs, ours) in ((torch.float32, pairs.narrow), (torch.float64, pairs.wide)):
        made = {name: kind(**theirs.components) for name, kind in zip(KINDS, classes, strict=True)}
        for pipe in made.values():
            pipe.set_progress_bar_config(disable=True)
        found[dtype] = Pair(made, ours)
    return found


def picture(seed: int = 0, size: tuple[int, int] = (H, W)) -> Image.Image:
    """A picture of soft spots."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)


def stroke(size: tuple[int, int] = (H, W)) -> Image.Image:
    """A mask whose edges lie between latents, and between 0 and 1."""
    mask = np.zeros(size, np.uint8)
    mask[5:27, 13:37], mask[5:9, 13:20] = 255, 127
    return Image.fromarray(mask)


def generators(count: int | None = None) -> Any:
    """One generator, or a list of some."""
    if count is None:
        return torch.Generator().manual_seed(5)
    return [torch.Generator().manual_seed(5 + i) for i in range(count)]


@contextmanager
def one_noise() -> Iterator[None]:
    """Inside, noise is drawn in float32 in either precision, which alone draws other numbers."""
    randn = torch.randn

    def drawn(*shape: Any, dtype: Any = None, **how: Any) -> torch.Tensor:
        return randn(*shape, dtype=FLOAT32, **how).to(dtype or torch.get_default_dtype())

    with mock.patch.object(torch, "randn", drawn):
        yield


def arguments(kind: str, case: str, **options: Any) -> dict[str, Any]:
    """Arguments of a call, made anew, since diffusers changes lists."""
    given = {"prompt": PROMPT, "height": H, "width": W, "num_inference_steps": 8, "guidance_scale": 0.0,
             "output_type": "latent", "strength": 0.6, "image": [0], **CASES[case], **options}  # fmt: skip
    size, sources = (H, W), given.pop("image")
    if isinstance(sources, tuple):
        size, sources = sources, [0]
    images = [picture(each, size) for each in sources]
    given["image"] = images if len(images) > 1 else images[0]
    if kind == "inpaint":
        given["mask_image"] = stroke(size)
    given["prompt"] = list(given["prompt"]) if isinstance(given["prompt"], list) else given["prompt"]
    given["generator"] = generators(given.pop("generator", None))
    if given.get("latents"):
        given["latents"] = torch.randn(1, 16, H // 8, W // 8, generator=generators())
    return {name: value for name, value in given.items() if value is not None}


def both(pair: Pair, kind: str, case: str, **options: Any) -> tuple[Any, Any]:
    """The images of both for one case."""
    with warnings.catch_warnings(), one_noise():
        warnings.simplefilter("ignore")
        theirs = pair.theirs[kind](**arguments(kind, case, **options)).images
        return theirs, pair.ours(**arguments(kind, case, **options)).images


def difference(pairs: dict[torch.dtype, Pair], kind: str, case: str) -> Difference:
    """Of the latents after the last step."""
    narrow, wide = pairs.values()

    def run() -> Outputs:
        pair = wide if torch.get_default_dtype() == torch.float64 else narrow
        return {LATENTS: both(pair, kind, case)}

    (found,) = compare(kind, case, run)
    return found


def editing_differences() -> Iterator[Difference]:
    """Latents after the last step, for each case of both pipelines."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder))
        yield from (difference(pairs, kind, case) for kind in KINDS for case in CASES)
