"""The model in the package is the one that the benchmarks describe, and it draws what the prompt says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.nano.check import SEED, exam, read, score
from benchmarks.nano.draw import fonts_installed
from benchmarks.nano.export import ASSETS
from benchmarks.nano.vocabulary import encode
from zimage_core import ZImagePipeline
from zimage_core.assets import PARTS
from zimage_core.text.prompt import prompt_ids


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_default()


def test_the_files_are_within_twelve_megabytes():
    sizes = {f.name: f.stat().st_size for f in ASSETS.iterdir() if f not in PARTS.values()}
    assert {"transformer.gguf", "text_encoder.gguf", "vae.safetensors"} <= set(sizes)
    assert sum(sizes.values()) <= 12_000_000


def test_the_lora_and_the_controlnet_are_within_a_megabyte_and_a_half():
    assert sum(path.stat().st_size for path in PARTS.values()) <= 1_500_000


def test_the_shipped_tokeniser_knows_the_words(pipe: ZImagePipeline):
    ids = pipe.tokenizer.encode("a small red circle, 黑色背景中间")
    words = ["a", " small", " red", " circle", ",", " ", "黑色", "背景", "中间"]
    assert [pipe.tokenizer.decode([i]) for i in ids] == words


@pytest.mark.slow  # trains the tokeniser again, five seconds of a free core
def test_the_shipped_tokeniser_is_the_trained_one(pipe: ZImagePipeline):
    for text in (
        "a small red circle on the left of a blue background",
        "黑色背景中间有一个大黄色星形",
        "white background, the letter Q",
        "",
        "a thing it never saw, naïve 🙂 <think>so</think>",
    ):
        assert list(prompt_ids(pipe.tokenizer, text)) == encode(text)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a small red circle on the left of a blue background", ("red", "blue", "circle", "left", "small")),
        ("黑色背景中间有一个大黄色星形", ("yellow", "black", "star", "center", "big")),
        (
            "a big green square at the bottom of a white background",
            ("green", "white", "square", "bottom", "big"),
        ),
    ],
)
def test_the_image_shows_the_prompt(pipe: ZImagePipeline, prompt: str, wanted: tuple[str, ...]):
    seen = read(np.asarray(pipe(prompt, seed=0).images[0]))
    assert (seen.colour, seen.background, seen.shape, seen.position, seen.size) == wanted


@pytest.mark.slow  # sixty images
def test_the_first_prompts_of_the_exam_are_drawn_right(pipe: ZImagePipeline):
    """docs/explanation/nano.md says 98.8 % of 500; another rounding may turn a few of the 60."""
    asked = [
        (k, s, p) for k, (s, p) in enumerate(zip(*exam(60), strict=True)) if fonts_installed() or not s.glyph
    ]
    seen = [read(np.asarray(pipe(prompt, seed=SEED + k).images[0])) for k, _, prompt in asked]
    table = score([scene for _, scene, _ in asked], seen)["everything"]
    assert table["right"] >= 0.9 * table["of"], table
