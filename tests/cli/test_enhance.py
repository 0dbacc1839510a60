"""`zimage enhance` and `generate --enhance`."""

import io
import json
import sys

import pytest

from zimage_core.files.png import read_metadata
from zimage_core.pipeline import ZImagePipeline

SHORT = ("--max-new-tokens", 24, "--seed", 3, "--device", "cpu")


def expected(model, **more):
    return ZImagePipeline.from_text_encoder(model / "text_encoder").enhance_prompt(
        "a cat", **{"seed": 3, "max_new_tokens": 24, **more}
    )


def shown(text):
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


pytestmark = pytest.mark.filterwarnings("ignore:the new prompt was cut", "ignore:the thought was ended")


def test_the_prompt_alone_goes_to_standard_output(zimage, model):
    outcome = zimage("enhance", "a cat", "--text-encoder", model / "text_encoder", *SHORT)
    assert outcome.status == 0, outcome.err
    assert outcome.out == shown(expected(model)) + "\n"
    assert "seed 3: 24 tokens in" in outcome.err
    assert outcome.out == zimage("enhance", "a cat", "--model", model, *SHORT).out


def test_options_are_those_of_the_library(zimage, model, tmp_path):
    told = tmp_path / "told.txt"
    told.write_text("Say it in blue.", "utf-8")
    words = ("--no-think", "--temperature", 1.5, "--top-p", 0.5, "--top-k", 9, "--min-p", 0.01, "--json")
    for instructions in (told, "Say it in blue."):
        outcome = zimage("enhance", "a cat", "--model", model, *SHORT, *words, "--instructions", instructions)
        found = json.loads(outcome.out)
        want = expected(
            model,
            think=False,
            temperature=1.5,
            top_p=0.5,
            top_k=9,
            min_p=0.01,
            instructions="Say it in blue.",
        )
        assert found["prompt"] == want
        assert found["original_prompt"] == "a cat"
        assert found["enhanced"] == want.settings["enhanced"]
        assert (found["tokens"], found["thought"]) == (24, "")


def test_a_file_of_instructions_that_cannot_be_read_is_not_taken_for_the_text(zimage, model, tmp_path):
    words = ("enhance", "a cat", "--model", model, *SHORT, "--instructions")
    assert "no such file" in zimage(*words, tmp_path / "tolt.txt").error
    assert "directory" in zimage(*words, tmp_path).error


def test_what_is_written_is_shown_as_it_comes(zimage, model):
    outcome = zimage("enhance", "a cat", "--model", model, *SHORT, "--verbose", "--quiet", "--no-think")
    assert outcome.err.startswith(outcome.out)
    quiet = zimage("enhance", "a cat", "--model", model, *SHORT, "--quiet")
    assert all(line.startswith("warning: ") for line in quiet.err.splitlines())


def test_the_prompt_may_come_from_standard_input(zimage, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a cat\n")))
    assert zimage("enhance", "-", "--model", model, *SHORT).out == shown(expected(model)) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--text-encoder"),
        (("--temperature", -1), "--temperature: got -1.0, wanted a number from 0 to 100"),
        (("--max-new-tokens", 1), "--max-new-tokens: got 1, wanted an integer from 2 to 65536"),
        (("--no-think", "--keep-thought"), "--keep-thought: without thinking"),
        (("--seed", -1), "--seed: got -1"),
    ],
)
def test_what_is_wrong_is_one_line(zimage, words, message):
    assert message in zimage("enhance", "a cat", "--device", "cpu", *words).error


def test_a_limit_of_memory_needs_the_whole_model(zimage, model):
    words = ("enhance", "a cat", *SHORT, "--ram", "4GiB")
    refused = zimage(*words, "--text-encoder", model / "text_encoder")
    assert "give --model FOLDER" in refused.error
    assert zimage(*words, "--model", model).out == shown(expected(model)) + "\n"


def test_generate_shows_what_was_written_and_keeps_both_prompts(zimage, model, tmp_path):
    words = ("--model", model, "-W", 32, "-H", 32, "--steps", 1, "--seed", 6, "-n", 2, "--device", "cpu")
    writing = ("--enhance", "--max-new-tokens", 24)
    outcome = zimage("generate", "a cat", *writing, *words, "-o", tmp_path / "a.png")
    assert outcome.status == 0, outcome.err
    settings = [read_metadata(tmp_path / f"a-{i}.png").settings for i in (1, 2)]
    want = expected(model, seed=6)
    for each in settings:
        assert (each["prompt"], each["original_prompt"]) == (want, "a cat")
        assert each["enhanced"]["seed"] == 6
    assert outcome.err.count("prompt: ") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--no-think",), "--no-think: it says how --enhance writes"),
        (("--top-p", 0.5), "--top-p: it says how --enhance writes"),
        (("--enhance", "--top-p", 2), "--top-p: got 2"),
        (("--enhance", "--no-think", "--keep-thought"), "--keep-thought: without thinking"),
    ],
)
def test_generate_checks_how_to_write_before_it_loads(zimage, words, message):
    assert message in zimage("generate", "a cat", "--model", "nowhere", *words).error


def test_the_embedded_model_cannot_write(zimage):
    error = zimage("generate", "a cat", "--enhance", "--device", "cpu").error
    assert "give a Qwen3 text encoder" in error
    assert "as --text-encoder" in error
