"""The byte-level BPE on any text: equal to transformers', reversible, and linear in time."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import qwen_vocabulary
from zimage_core.errors import BadArgument

# Where tokenizers go wrong: spaces and line ends in a row, contractions, digits, joiners, decomposed
# letters, added tokens whole and cut.
PIECES = [
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u3000",
        "\u00a0",
        "'s",
        "'LL",
        "don't",
        "123",
        "\uff14\uff15",
        "½",
        "a",
        "Word",
    ),
    *(
        "中文",
        "写着",
        "“",
        "”",
        "\uff0c",
        "e\u0301",
        "\u1100\u1161\u11a8",
        "한",
        "🐱",
        "👨‍👩‍👧",
        "\ufe0f",
        "\u200d",
        "\u0301",
    ),
    *(
        "ﬁ",
        "Ω",
        "Å",
        "ß",
        "ن",
        "ก็",
        "\x00",
        "\x7f",
        "\U0010ffff",
        "!!",
        "...",
        "=>",
        "<|",
        "|>",
        "<think",
        "think>",
    ),
    *qwen_vocabulary.ADDED,
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=24).map("".join)


@pytest.fixture(scope="module")
def anchor():
    transformers = pytest.importorskip("transformers")
    vocab, merges = qwen_vocabulary.vocab_and_merges()
    tokenizer = transformers.Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges))
    contents = qwen_vocabulary.ADDED
    added = [
        transformers.AddedToken(c, normalized=False, special=c in qwen_vocabulary.SPECIAL) for c in contents
    ]
    tokenizer.add_tokens(added)
    return tokenizer


@pytest.mark.parity
@given(text=texts)
def test_ids_are_those_of_transformers(qwen, anchor, text):
    assert qwen.encode(text) == anchor.encode(text, add_special_tokens=False), ascii(text)


@given(text=texts)
def test_decoding_gives_the_composed_text_back(qwen, text):
    decoded = qwen.decode(qwen.encode(text))
    # A word is composed after the added tokens are cut out, so a mark right after one stays decomposed.
    assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text), ascii(text)


def test_half_a_character_decodes_to_the_replacement_character(qwen):
    ids = qwen.encode("\U0010ffff")
    assert len(ids) > 1
    assert "\ufffd" in qwen.decode(ids[:-1])


def test_ids_outside_the_vocabulary_are_refused(qwen):
    for number in (-1, 151669, 1 << 40):
        with pytest.raises(BadArgument, match=f"{number} is not in the vocabulary of 151669"):
            qwen.decode([number])


@pytest.mark.parametrize(
    ("text", "found"), [("a\ud800b", "character 1 .*surrogate"), (b"abc", "bytes"), (None, "None")]
)
def test_what_is_not_text_is_refused(qwen, text, found):
    with pytest.raises(BadArgument, match=found):
        qwen.encode(text)


@pytest.mark.parametrize("char", ["a", " ", "\n", "中", "🐱", "!", "\u0301"], ids=ascii)
def test_time_grows_with_the_length_and_no_faster(qwen, char):
    """CPU seconds of this thread, so that a busy machine matters little; linear is 4, quadratic 16."""

    def seconds(size: int) -> float:
        text = char * (size // len(char.encode()))
        start = time.thread_time()
        qwen.encode(text)
        return time.thread_time() - start

    seconds(1 << 12)
    short, long = (min(seconds(size), seconds(size)) for size in (1 << 16, 1 << 18))
    assert long < 8 * short + 0.05, f"{short:.3f} s for 64 KiB, {long:.3f} s for 256 KiB"


def test_a_mebibyte_of_one_character_takes_less_than_two_seconds(qwen):
    start = time.thread_time()
    qwen.encode("a" * (1 << 20))
    assert time.thread_time() - start < 2
