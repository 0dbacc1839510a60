"""The list of words in the package is that of the training, and a prompt beyond it is named."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from benchmarks.nano.draw import describe, loosen, random_scene, words
from tests.helpers.tree import ROOT
from zimage_core import ZImagePipeline
from zimage_core.assets import NANO
from zimage_core.assets.words import WORDS, learned, remark


def test_the_list_in_the_package_is_that_of_the_drawings():
    assert json.loads(WORDS.read_text("utf-8")) == words()


def test_every_prompt_of_the_training_is_learned_and_every_word_occurs():
    rng, said = np.random.default_rng(5), ""
    for k in range(3000):
        prompt = describe(random_scene(rng, bool(k % 3)), rng, chinese=bool(k % 2), omit=0.1)
        prompt = loosen(prompt, rng)
        assert remark(prompt) == "", prompt
        said += f"{prompt}\n"
    for word in {word for found in learned().values() for word in found}:
        assert re.search(rf"\b{word}\b", said) if word.isascii() and word != "," else word in said, word


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("a cat", "'cat'"),
        ("", "names no shape"),
        ("   ", "names no shape"),
        ("red on blue", "names no shape"),
        ("RED CIRCLE on a blue background", "'RED', 'CIRCLE'"),
        ("a red circle and a blue square", "'and'"),
        ("a red circle, a blue square", "several things"),
        ("the digit 77", "several things"),
        ("a red circle \N{CAT FACE}\N{VARIATION SELECTOR-16}", "the word '"),
        ("一只猫", "the word '一只猫'"),
        ("the letter é", "'é'"),
        ("a red green blue circle", "so many colours"),
        ("a red circle on the top left", "so many colours, sizes or places"),
        ("the big letter Q", "sizes and places of letters"),
        ("two small stars", "several shapes"),
        ("x " * 5000, "the word 'x';"),
    ],
)
def test_what_was_never_learned_is_named(prompt, what):
    said = remark(prompt)
    assert what in said
    assert len(said) < 450
    assert "circle, square, triangle, star, cross, ring, letter" in said
    assert "red, green, blue" in said


@pytest.mark.parametrize(
    "prompt",
    [
        "A red star.",
        "Red star",
        "white background, A",
        "大 in red",
        "the letter A in red",
        "红色的汉字大",
        "star!",
    ],
)
def test_what_was_learned_is_not(prompt):
    assert remark(prompt) == ""


def test_a_pipeline_of_the_embedded_text_encoder_warns():
    pipe = ZImagePipeline.from_pretrained(NANO)
    small = {"num_inference_steps": 1, "width": 16, "height": 16, "output_type": "latent"}
    with pytest.warns(UserWarning, match="never learned the word 'cat'"):
        pipe("a cat", **small)
    with pytest.warns(UserWarning, match="never learned the word 'dog'"):
        pipe(["red star", "a dog"], **small)


def test_the_page_has_all_words():
    page = (ROOT / "docs" / "explanation" / "nano.md").read_text("utf-8")
    for kind, found in learned().items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {kind} "))
        assert all(word in row for word in found if kind != "glyphs"), kind
