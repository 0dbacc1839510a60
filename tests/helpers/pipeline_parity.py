"""diffusers' ZImagePipeline beside ours on one tiny checkpoint folder, and how far their latents are apart.

Used by tests/parity/test_pipeline.py (which asserts) and benchmarks/parity.py (which writes the table).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.helpers import tiny
from tests.helpers.parity import Difference, Outputs, compare, widen
from zimage_core.pipeline import ZImagePipeline

PROMPT = "a small red circle on the left 红色 <think>x</think>"
LATENTS = "latents after the last step"
Pair = tuple[Any, ZImagePipeline]


class Pairs(NamedTuple):
    """diffusers' pipeline and ours, in float32 and in float64."""

    narrow: Pair
    wide: Pair
    shift: float


class TheirTokenizer:
    """diffusers asks a transformers tokenizer for template and padding; this one gives it our ids."""

    def __init__(self) -> None:
        self.ours = tiny.tokenizer()

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return f"<|im_start|>user\n{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> Any:
        from transformers import BatchEncoding

        rows = [self.ours.encode(text)[:max_length] for text in texts]
        ids = torch.tensor([row + [256] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def write_checkpoint(where: Path, shift: float) -> Path:
    """A folder as diffusers and transformers save one, with our tokenizer."""
    import diffusers
    import transformers

    drawn, folder = tiny.folder(where / "drawn", shift), where / "saved"
    for part, kind in {
        "transformer": diffusers.ZImageTransformer2DModel,
        "text_encoder": transformers.Qwen3Model,
        "vae": diffusers.AutoencoderKL,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    }.items():
        kind.from_pretrained(drawn / part).save_pretrained(folder / part)
    tiny.write_tokenizer(folder / "tokenizer")
    tiny.write_json(folder / "model_index.json", {"_class_name": "ZImagePipeline"})
    return folder


def make_pair(folder: Path) -> Pair:
    """diffusers' pipeline and ours, read from one folder."""
    import diffusers
    import transformers

    theirs = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=transformers.Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=None,
        transformer=diffusers.ZImageTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    theirs.tokenizer = TheirTokenizer()
    theirs.set_progress_bar_config(disable=True)
    return theirs, ZImagePipeline.from_pretrained(folder)


def make_pairs(where: Path, shift: float) -> Pairs:
    """One checkpoint in float32 and in float64."""
    folder = write_checkpoint(where, shift)
    narrow, wide = make_pair(folder), make_pair(folder)
    for pipe in wide:
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            widen(part)
    return Pairs(narrow, wide, shift)


def both(pair: Pair, **kwargs: Any) -> tuple[Any, Any]:
    """Outputs of one call of each; the arguments are the same but for lists, which diffusers modifies."""

    def fresh() -> dict[str, Any]:
        made = {k: v() if callable(v) else v for k, v in kwargs.items()}
        return {"prompt": PROMPT, "height": 32, "width": 48, "num_inference_steps": 8,
                "output_type": "latent", "guidance_scale": 0.0, **made}  # fmt: skip

    theirs, ours = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs(**fresh()).images, ours(**fresh()).images


def difference(pairs: Pairs, case: str, place: str = LATENTS, **options: Any) -> Difference:
    """Of the outputs of a call, from the same noise."""
    noise = start(case)

    def run() -> Outputs:
        dtype = torch.get_default_dtype()
        pair = pairs.wide if dtype == torch.float64 else pairs.narrow
        return {place: both(pair, latents=noise.to(dtype).clone, **CASES[case], **options)}

    (found,) = compare("pipeline", f"shift {pairs.shift:g}, {case}", run)
    return found


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(42)


def end_guidance(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback_on_step_end that switches guidance off for the second half of eight steps."""
    if step == 3:
        pipe._guidance_scale = 0.0
    return tensors


CASES: dict[str, dict[str, Any]] = {
    "no guidance": {},
    "guidance 4": {"guidance_scale": 4.0, "negative_prompt": "blue"},
    "guidance 1, empty negative": {"guidance_scale": 1.0},
    "cfg_normalization on": {"guidance_scale": 4.0, "cfg_normalization": True},
    "cfg_normalization 0.5": {"guidance_scale": 4.0, "cfg_normalization": 0.5},
    "cfg_truncation 0.3": {"guidance_scale": 4.0, "cfg_truncation": 0.3},
    "cfg_truncation 0": {"guidance_scale": 4.0, "cfg_truncation": 0.0},
    "two prompts of different length": {"prompt": lambda: ["a", PROMPT * 2], "guidance_scale": 2.0,
                                        "negative_prompt": lambda: ["", "no circle"]},
    "two images a prompt": {"prompt": lambda: ["a", "b"], "num_images_per_prompt": 2},
    "guidance ended by the callback": {"guidance_scale": 4.0, "callback_on_step_end": lambda: end_guidance},
    "own sigmas": {"sigmas": lambda: [1.0, 0.6, 0.2], "guidance_scale": 2.0},
    "one step": {"num_inference_steps": 1},
    "cut prompt": {"max_sequence_length": 9},
}  # fmt: skip


def start(case: str) -> torch.Tensor:
    """Starting noise of a case."""
    images = 4 if "two images" in case else 2 if "two prompts" in case else 1
    return torch.randn(images, 16, 4, 6, generator=generator())


def pipeline_differences() -> Iterator[Difference]:
    """Latents after the last step, for each case and both shifts."""
    with tempfile.TemporaryDirectory() as folder:
        for shift in (3.0, 6.0):
            pairs = make_pairs(Path(folder) / str(shift), shift)
            yield from (difference(pairs, case) for case in CASES)
