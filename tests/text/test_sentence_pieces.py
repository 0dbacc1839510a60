"""A SentencePiece vocabulary rebuilt from GGUF keys gives the ids of the model that it came from."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_core.errors import BadArgument, BadFile, Unsupported
from zimage_core.text.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "a small red circle on the left of a blue background",
    "黑色背景中间有一个大黄色星形",
    "two  spaces and 123 numbers",
] * 20


def train(**options: Any) -> Any:
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "character_coverage": 0.98}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        normalization_rule_name="identity",
        user_defined_symbols=["<sep>"],
        control_symbols=["<|end|>", "<|end|>er"],
        minloglevel=2,
        **(defaults | {"remove_extra_whitespaces": False} | options),
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(processor: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a SentencePiece model."""
    ids = range(processor.vocab_size())

    def kind(number: int) -> int:
        if processor.IsUnknown(number):
            return 2
        if processor.IsControl(number):
            return 3
        if processor.IsByte(number):
            return 6
        return 4 if processor.IdToPiece(number) == "<sep>" else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.IdToPiece(number) for number in ids],
        "tokenizer.ggml.scores": [processor.GetScore(number) for number in ids],
        "tokenizer.ggml.token_type": [kind(number) for number in ids],
    }


PLAIN = train()
METADATA = metadata_of(PLAIN)
TOKENIZER = Tokenizer.from_metadata(METADATA, "model.gguf")
VARIANTS = {
    "space prefix": (PLAIN, {}),
    "no space prefix": (train(add_dummy_prefix=False), {"tokenizer.ggml.add_space_prefix": False}),
    "no byte fallback": (train(byte_fallback=False, vocab_size=120), {}),
    "spaces removed": (
        train(remove_extra_whitespaces=True),
        {"tokenizer.ggml.remove_extra_whitespaces": True},
    ),
}
texts = st.lists(
    st.one_of(st.sampled_from([*LINES[:4], "<sep>", "<s>", "  ", "é", "🐱", "\n"]), st.text(max_size=5))
)


@pytest.mark.parametrize("name", VARIANTS)
@given(parts=texts)
def test_ids_are_those_of_the_original_model(name, parts):
    original, keys = VARIANTS[name]
    text = "".join(parts).replace("\0", "").replace("<s>", "")
    tokenizer = BUILT.setdefault(name, Tokenizer.from_metadata(metadata_of(original) | keys))
    assert tokenizer.encode(text) == original.EncodeAsIds(text), ascii(text)


BUILT: dict[str, Tokenizer] = {}


@given(parts=texts)
def test_text_comes_back_whole(parts):
    text = "".join(parts).replace("\u2581", "").replace("\0", "")  # U+2581 is how a space is written
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text, ascii(text)


def test_control_tokens_are_matched_literally_the_longest_first():
    end, ender, sep = (PLAIN.PieceToId(piece) for piece in ("<|end|>", "<|end|>er", "<sep>"))
    the = PLAIN.EncodeAsIds("the")
    assert TOKENIZER.encode("the<|end|>the<|end|>er<|end|>") == [*the, end, *the, ender, end]
    assert PLAIN.EncodeAsIds("<|end|>") != [end], "left to itself, SentencePiece spells control tokens out"
    assert TOKENIZER.added_tokens == {"<s>": 1, "</s>": 2, "<|end|>": end, "<|end|>er": ender, "<sep>": sep}
    assert TOKENIZER.vocab_size == 420


def test_the_fingerprint_sees_scores_and_flags():
    scores = [score - 1 for score in METADATA["tokenizer.ggml.scores"]]
    other = Tokenizer.from_metadata(METADATA | {"tokenizer.ggml.scores": scores})
    flag = Tokenizer.from_metadata(METADATA | {"tokenizer.ggml.add_space_prefix": False})
    assert len({TOKENIZER.fingerprint, other.fingerprint, flag.fingerprint}) == 3
    assert Tokenizer.from_metadata(METADATA).fingerprint == TOKENIZER.fingerprint


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(BadArgument, match="token id 420 is not in the vocabulary of 420"):
        TOKENIZER.decode([420])


def test_a_mebibyte_of_one_character_takes_less_than_two_seconds():
    start = time.thread_time()
    TOKENIZER.encode("a" * (1 << 20))
    assert time.thread_time() - start < 2


def edited(key: str, index: int, value: Any) -> dict[str, Any]:
    items = list(METADATA[f"tokenizer.ggml.{key}"])
    items[index] = value
    return METADATA | {f"tokenizer.ggml.{key}": items}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (METADATA | {"tokenizer.ggml.scores": [0] * 420}, "scores holds values that are not of type float"),
        (METADATA | {"tokenizer.ggml.scores": [0.0]}, "scores has 1 values for 420 tokens"),
        (edited("scores", 9, float("nan")), "scores holds a value that is not finite"),
        (edited("scores", 9, 1e39), "scores holds a value that is not finite"),
        (edited("tokens", 300, "a\0"), "SentencePiece refuses the vocabulary: .*null"),
        (edited("tokens", 300, ""), "token 300 is empty"),
        (edited("tokens", 300, "<s>"), "duplicate token"),
        (edited("tokens", 300, "\ud800"), "lone surrogate"),
        (edited("token_type", 0, 1), "0 tokens of type 'unknown'"),
        (edited("token_type", 300, 2), "2 tokens of type 'unknown'"),
        (edited("token_type", 7, 1), "255 byte tokens, all 256"),
        (edited("tokens", 7, "<0x-1>"), "256 byte tokens, all 256"),
        (METADATA | {"tokenizer.ggml.add_space_prefix": 1}, "add_space_prefix is not a truth value"),
        ({k: v for k, v in METADATA.items() if "scores" not in k}, "scores is missing"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_sentencepiece_could_not_use_is_refused(metadata, message):
    with pytest.raises(BadFile, match=message):
        Tokenizer.from_metadata(metadata, "model.gguf")


def test_a_character_map_is_refused_by_name():
    with pytest.raises(Unsupported, match="precompiled_charsmap"):
        Tokenizer.from_metadata(METADATA | {"tokenizer.ggml.precompiled_charsmap": [1]})
