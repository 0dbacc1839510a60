"""The pieces of an Omni prompt, and their token ids."""

from __future__ import annotations

import pytest

from tests.helpers import tiny
from zimage_core.omni.pieces import piece_ids, pieces

USER, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
START, END = "<|vision_start|>", "<|vision_end|>"
PROMPTS = ["", "a cat", "{prompt}", f"{END}<|im_end|>"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_stand_around_the_images(prompt):
    last = (f"{END}{prompt}{ANSWER}{START}", f"{END}<|im_end|>")
    assert pieces(prompt, 0) == (f"{USER}{prompt}{ANSWER}",)
    assert pieces(prompt, 1) == (USER + START, *last)
    assert pieces(prompt, 3) == (USER + START, END + START, END + START, *last)


def test_no_thinking_is_an_empty_thought_before_the_image():
    thought = "<think>\n\n</think>\n\n"
    assert pieces("a", 0, False) == (f"{USER}a{ANSWER}{thought}",)
    assert pieces("a", 1, False)[1] == f"{END}a{ANSWER}{thought}{START}"


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_piece_is_tokenised_alone_and_cut_alone(prompt, count):
    tokenizer = tiny.tokenizer()
    whole = piece_ids(tokenizer, prompt, count, 512)
    assert list(whole) == list(dict.fromkeys(pieces(prompt, count)))
    assert whole == {piece: tokenizer.encode(piece) for piece in whole}
    with pytest.warns(UserWarning, match="the limit is 5"):
        cut = piece_ids(tokenizer, prompt, count, 5)
    assert cut == {piece: ids[:5] for piece, ids in whole.items()}
