"""diffusers' ZImageOmniPipeline beside ours on one tiny checkpoint folder, written by its components.

Used by tests/omni/test_parity.py (which asserts) and benchmarks/parity.py (which writes the table).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from tests.helpers import tiny
from tests.helpers.parity import Difference, Outputs, compare, randomise, widen
from tests.helpers.pipeline_parity import LATENTS, Pairs, TheirTokenizer
from zimage_core.omni_pipelines import ZImageOmniPipeline

WIDTH = 24
"""Channels of the vision features."""
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_patches": 16, "patch_size": 16, "vision_use_head": False,
}  # fmt: skip
PATCHES = 12
"""Most patches of an image; the position table has 16."""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of large coloured patches with some noise, so that a shift of a pixel shows."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((large + rng.integers(-20, 20, large.shape)).clip(0, 255).astype(np.uint8))


def write_folder(where: Path, shift: float = 3.0, vision: bool = True) -> Path:
    """An Omni checkpoint as diffusers and transformers save one, with our tokenizer.

    Args:
        where: An empty folder.
        shift: Shift of its schedule.
        vision: False leaves the vision tower out.
    """
    import diffusers
    import transformers

    drawn, folder = tiny.folder(where / "drawn", shift), where / "omni"
    for part, kind in {
        "text_encoder": transformers.Qwen3Model,
        "vae": diffusers.AutoencoderKL,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    }.items():
        kind.from_pretrained(drawn / part).save_pretrained(folder / part)
    options = {k: v for k, v in tiny.TRANSFORMER.items() if not k.startswith("_")}
    net = diffusers.ZImageTransformer2DModel(**options, siglip_feat_dim=WIDTH)
    randomise(net, 0.1, seed=5)
    net.save_pretrained(folder / "transformer")
    if vision:
        tower = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**VISION))
        randomise(tower, 0.15, seed=6)
        tower.save_pretrained(folder / "siglip")
        processor(PATCHES).save_pretrained(folder / "siglip_processor")
    tiny.write_tokenizer(folder / "tokenizer")
    tiny.write_json(folder / "model_index.json", {"_class_name": "ZImageOmniPipeline"})
    return folder


def processor(patches: int) -> Any:
    """transformers' image processor by way of Pillow."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    return Siglip2ImageProcessorPil(patch_size=16, max_num_patches=patches)


class TheirProcessor:
    """transformers' image processor, whose pixels are float32 whatever is asked for, in the default dtype."""

    def __init__(self) -> None:
        self.theirs = processor(PATCHES)

    def __call__(self, **call: Any) -> Any:
        found = self.theirs(**call)
        levels = ((found["pixel_values"] + 1) * 127.5).round()
        found["pixel_values"] = (levels.to(torch.get_default_dtype()) / 255 - 0.5) / 0.5
        return found


def make_pair(folder: Path) -> tuple[Any, ZImageOmniPipeline]:
    """diffusers' pipeline and ours, read from one folder."""
    import diffusers
    import transformers

    theirs = diffusers.ZImageOmniPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=transformers.Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=None,
        transformer=diffusers.ZImageTransformer2DModel.from_pretrained(folder / "transformer"),
        siglip=transformers.Siglip2VisionModel.from_pretrained(folder / "siglip", dtype=torch.float32),
        siglip_processor=processor(PATCHES),
    )
    theirs.tokenizer, theirs.siglip_processor = TheirTokenizer(), TheirProcessor()
    theirs.set_progress_bar_config(disable=True)
    return theirs, ZImageOmniPipeline.from_pretrained(folder)


def make_pairs(where: Path, shift: float = 3.0) -> Pairs:
    """One checkpoint in float32 and in float64."""
    folder = write_folder(where, shift)
    narrow, wide = make_pair(folder), make_pair(folder)
    for pipe in wide:
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae, pipe.siglip):
            widen(part)
    return Pairs(narrow, wide, shift)


@contextmanager
def without_bfloat16() -> Iterator[None]:
    """Inside, diffusers does not round references to bfloat16, which its VAE in float32 could not take."""
    dtype = torch.get_default_dtype()
    with mock.patch.object(torch.Tensor, "bfloat16", lambda self: self.to(dtype)):
        yield


def both(pair: tuple[Any, Any], **kwargs: Any) -> tuple[Any, Any]:
    """Outputs of one call of each; the arguments are the same but for lists, which diffusers modifies."""

    def fresh() -> dict[str, Any]:
        made = {k: v() if callable(v) else v for k, v in kwargs.items()}
        return {"prompt": "a red circle beside this", "num_inference_steps": 4, "output_type": "latent",
                "guidance_scale": 0.0, **made}  # fmt: skip

    theirs, ours = pair
    with warnings.catch_warnings(), without_bfloat16():
        warnings.simplefilter("ignore")
        return theirs(**fresh()).images, ours(**fresh(), positions="diffusers").images


def images(*sizes: tuple[int, int]) -> Any:
    """A function that draws pictures of these widths and heights."""
    return lambda: [picture(*size, seed=i) for i, size in enumerate(sizes)]


CASES: dict[str, dict[str, Any]] = {
    "no reference": {"height": 64, "width": 80},
    "no reference, guidance": {"height": 64, "width": 80, "guidance_scale": 3.0, "negative_prompt": "blue"},
    "one": {"image": images((96, 64))},
    "one, guidance": {"image": images((96, 64)), "guidance_scale": 3.0, "negative_prompt": "blue"},
    "one of odd sides": {"image": images((101, 75))},
    "one, another size": {"image": images((96, 64)), "height": 64, "width": 64},
    "two": {"image": images((96, 64), (64, 80))},
    "two, guidance, truncated": {"image": images((96, 64), (64, 80)), "guidance_scale": 3.0,
                                 "cfg_truncation": 0.6, "cfg_normalization": 1.0},
    "three": {"image": images((64, 128), (64, 80), (96, 64))},
    "two prompts, two references, guidance": {
        "image": images((96, 64), (64, 80)), "guidance_scale": 2.0,
        "prompt": lambda: ["a", "a much longer prompt of more than thirty-two tokens, since each is a byte"],
        "negative_prompt": lambda: ["", "no circle"],
    },
    "two images a prompt": {"image": images((80, 64)), "prompt": lambda: ["a", "b"],
                            "num_images_per_prompt": 2},
    "above a million pixels": {"image": images((1600, 800)), "height": 64, "width": 64,
                               "num_inference_steps": 1},
    "cut pieces": {"image": images((96, 64)), "max_sequence_length": 20},
}  # fmt: skip


def difference(pairs: Pairs, case: str) -> Difference:
    """Of the latents of a case, from the same noise."""
    options = CASES[case]
    count = 4 if "two images" in case else 2 if "two prompts" in case else 1
    height, width = options.get("height"), options.get("width")
    if height is None:
        width, height = (side // 16 * 16 for side in options["image"]()[-1].size)
    noise = torch.randn(
        (count, 16, height // 8, width // 8), generator=torch.Generator().manual_seed(3), dtype=torch.float32
    )

    def run() -> Outputs:
        dtype = torch.get_default_dtype()
        pair = pairs.wide if dtype == torch.float64 else pairs.narrow
        return {LATENTS: both(pair, latents=noise.to(dtype).clone, **options)}

    (found,) = compare("Omni pipeline", case, run)
    return found


def pipeline_differences() -> Iterator[Difference]:
    """Latents after the last step, for each case."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder))
        yield from (difference(pairs, case) for case in CASES)
