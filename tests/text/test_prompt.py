"""The prompt string is Qwen3's, the prompt is not changed, and a warning shows text that is cut off."""

from __future__ import annotations

import warnings

import pytest

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.text.prompt import prompt_ids, render
from zimage_core.text.tokenizer import Tokenizer

ANY_TOKENIZER = Tokenizer.from_metadata(
    {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": [],
    }
)


def test_the_string_is_exactly_the_one_of_the_chat_template():
    assert render("X") == "<|im_start|>user\nX<|im_end|>\n<|im_start|>assistant\n"
    closed = "<|im_start|>user\nX<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render("X", enable_thinking=False) == closed


@pytest.mark.parametrize(
    "prompt", ["", "  two  ", "\n\n", "<think>a</think>b", "{prompt} {0} {{}}", "%s \\n"]
)
def test_the_prompt_stands_in_it_verbatim(prompt):
    assert render(prompt) == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_of_ones_own_is_used_as_it_is():
    assert render("X", template="<s>{prompt}{}</s>") == "<s>X{}</s>"
    assert render("X", enable_thinking=False, template="{prompt}") == "X"


@pytest.mark.parametrize("template", ["", "no place", "{prompt}{prompt}"])
def test_a_template_needs_one_place_for_the_prompt(template):
    with pytest.raises(BadArgument, match="once was expected"):
        render("X", template=template)


def test_a_bare_template_gives_the_bare_ids(qwen):
    assert prompt_ids(qwen, "a red circle", template="{prompt}") == qwen.encode("a red circle")


def test_a_tokenizer_without_the_chat_tokens_needs_a_template():
    with pytest.raises(Unsupported, match=r"no token <\|im_start\|>.*give template="):
        prompt_ids(ANY_TOKENIZER, "a")
    assert prompt_ids(ANY_TOKENIZER, "ab", template="{prompt}") == [0, 1]


def test_up_to_the_limit_nothing_is_said(qwen):
    prompt = "a" + " b" * 503  # 504 tokens and 8 of the template
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(prompt_ids(qwen, prompt)) == 512


def test_over_the_limit_the_right_end_is_cut_and_the_lost_text_named(qwen):
    prompt = "cat " * 600 + "and the last words: 紫色的猫 end"
    whole = qwen.encode(render(prompt))
    with pytest.warns(UserWarning, match="limit is 512") as caught:
        ids = prompt_ids(qwen, prompt)
    assert ids == whole[:512]
    (warning,) = caught
    lost = qwen.decode(whole[512:]).removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert lost.endswith("and the last words: 紫色的猫 end")
    assert lost in str(warning.message)
    assert "im_end" not in str(warning.message)
    assert "max_sequence_length (up to 1504)" in str(warning.message)
    assert warning.filename == __file__, "the warning points at the caller"


def test_when_only_the_template_is_cut_the_warning_says_so(qwen):
    with pytest.warns(UserWarning, match="the end of the template is lost"):
        ids = prompt_ids(qwen, "a" + " b" * 505)
    assert ids[-1] == qwen.added_tokens["<|im_start|>"]


def test_the_limit_can_be_raised_to_where_the_positions_end(qwen):
    prompt = "a" + " b" * 999
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(prompt_ids(qwen, prompt, max_sequence_length=1504)) == 1008
    with pytest.warns(UserWarning, match="limit is 3,"):
        assert len(prompt_ids(qwen, prompt, max_sequence_length=3)) == 3


@pytest.mark.parametrize("limit", [0, -1, 1505, 512.0, True, "512", None])
def test_a_limit_out_of_range_is_refused(qwen, limit):
    with pytest.raises(BadArgument, match=r"max_sequence_length is .* in 1\.\.1504"):
        prompt_ids(qwen, "a", max_sequence_length=limit)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a" * 16385, "16385 bytes in UTF-8, the limit is 16384"),
        ("中" * 5462, "16386 bytes"),
        ("a\0b", "NUL character at 1"),
        ("a\udc80", r"prompt: character 1 is \\udc80, a lone surrogate"),
        (None, "prompt is a NoneType, a string was expected"),
        (["a"], "prompt is a list"),
    ],
)
def test_a_prompt_that_no_one_can_mean_is_refused(qwen, prompt, message):
    with pytest.raises(BadArgument, match=message):
        prompt_ids(qwen, prompt)


def test_the_size_limit_is_inclusive_and_can_be_raised(qwen):
    with pytest.warns(UserWarning, match="is lost"):
        prompt_ids(qwen, "a " * 8192)
    with pytest.warns(UserWarning, match="is lost"):
        prompt_ids(qwen, "a " * 8193, max_prompt_bytes=20_000)
    with pytest.raises(BadArgument, match="the limit is 3;"):
        prompt_ids(qwen, "abcd", max_prompt_bytes=3)
