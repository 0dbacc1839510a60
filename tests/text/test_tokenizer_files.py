"""Tokenizer files give vocabulary, merges and added tokens; any other setting is refused by name."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest

from tests.helpers.small_tokenizer import ADDED, BYTE_LEVEL, DOCUMENT, PRE, SPLIT, VOCAB, changed, load
from zimage_core.errors import BadFile, Unsupported, ZImageError
from zimage_core.files import untrusted
from zimage_core.text import tokenizer_json
from zimage_core.text.byte_pairs import byte_alphabet
from zimage_core.text.pretokenizers import GPT2, LLAMA3
from zimage_core.text.tokenizer import Tokenizer

TEXT = "abab ab<s>a"
TEXT_IDS = [258, VOCAB["Ġ"], 256, 260, VOCAB["a"]]
FOR_A = {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing", "single": [FOR_A], "special_tokens": {},
    "pair": [FOR_A, {"Sequence": {"id": "B", "type_id": 1}}],
}  # fmt: skip
ADDS = TEMPLATE | {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, FOR_A]}
DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"normalizer": DEEP}


def test_the_baseline_is_sound(tmp_path):
    tokenizer = load(tmp_path, DOCUMENT)
    assert tokenizer.encode(TEXT) == TEXT_IDS
    assert tokenizer.decode([258, 257, VOCAB["b"], 260]) == "abab ab<s>"
    assert (tokenizer.vocab_size, tokenizer.added_tokens) == (261, {"<s>": 260})
    assert (
        load(tmp_path, changed("model.merges", ["a b", "Ġ a", "ab ab"])).fingerprint == tokenizer.fingerprint
    )


def test_the_fingerprint_sees_every_part(tmp_path):
    others = [
        changed("model.merges", [["a", "b"], ["ab", "ab"], ["Ġ", "a"]]),
        changed("model.vocab", {**VOCAB, "abab": 259}),
        changed("added_tokens", []),
        changed("added_tokens", [ADDED | {"content": "</s>"}]),
        changed("normalizer", None),
        changed("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False}),
        changed("model.ignore_merges", True),
    ]
    seen = [load(tmp_path, document).fingerprint for document in [DOCUMENT, *others]]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "document",
    [
        changed("model.dropout", None),
        changed("model.dropout", 0.0),
        changed("model.unk_token", "ab"),
        changed("model.continuing_subword_prefix", ""),
        changed("model.byte_fallback", False),
        changed("model.ignore_merges", None),
        changed("post_processor", BYTE_LEVEL),
        changed("post_processor", TEMPLATE),  # of transformers 5
        changed("post_processor", {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}),
        changed("post_processor", {"type": "Sequence", "processors": []}),
        changed("decoder", {"type": "Sequence", "decoders": [BYTE_LEVEL, {"type": "Fuse"}]}),
        changed("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": [PRE]}),
        changed(
            "pre_tokenizer",
            PRE | {"pretokenizers": [SPLIT | {"behavior": "Removed", "invert": True}, BYTE_LEVEL]},
        ),
        changed("decoder", None),
        # A pipeline that was used once and saved keeps the settings of that use.
        changed(
            "truncation", {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
        ),
        changed(
            "padding", {"strategy": {"Fixed": 512}, "pad_to_multiple_of": None, "pad_id": 0, "pad_token": "a"}
        ),
        changed("padding", {"strategy": "BatchLongest", "pad_to_multiple_of": 8, "pad_id": 0}),
        b"\xef\xbb\xbf" + json.dumps(DOCUMENT).encode(),
    ],
)
def test_what_changes_no_id_is_accepted(tmp_path, document):
    assert load(tmp_path, document).encode(TEXT) == TEXT_IDS


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "words"),
    [
        (PRE, None, ["1", "2", "3", "4", " x", "!\n"]),
        (None, None, ["1", "2", "3", "4", " x", "!\n"]),
        ({"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": LLAMA3}}, BYTE_LEVEL]}, None,
         ["123", "4", " x", "!\n"]),
        ({"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": GPT2}}, BYTE_LEVEL]}, None,
         ["1234", " x", "!", "\n"]),
        (BYTE_LEVEL | {"use_regex": True}, {"type": "Sequence", "normalizers": []},
         ["1234", " x", "!", "\n"]),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
          BYTE_LEVEL | {"use_regex": True}]}, None, ["1", "2", "3", "4", " x", "!", "\n"]),
    ],
)  # fmt: skip
def test_known_ways_of_cutting_words_are_recognised(tmp_path, pre_tokenizer, normalizer, words):
    # Every word of two or more characters that could be cut is made one token, so the ids show the cuts.
    text = "1234 x!\n"
    document = changed("pre_tokenizer", pre_tokenizer) | {"normalizer": normalizer}
    byte_chars = {byte: char for char, byte in byte_alphabet().items()}
    spell = [
        "".join(byte_chars[byte] for byte in piece.encode()) for piece in ("12", "123", "1234", " x", "!\n")
    ]
    document["model"]["vocab"] |= {piece: 300 + n for n, piece in enumerate(spell)}
    document["model"]["merges"] = [[piece[:-1], piece[-1]] for piece in spell]
    tokenizer = load(tmp_path, document)
    assert [tokenizer.decode([number]) for number in tokenizer.encode(text)] == words


def beside(folder, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer_config.json beside tokenizer.json."""
    load(folder, DOCUMENT)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


def test_added_tokens_of_the_config_beside_are_matched_too(tmp_path, recwarn):
    stated = {"260": ADDED | {"lstrip": True}, "300": {"content": "<t>"}, "9": {"content": "abab"}}
    tokenizer = beside(tmp_path, {"added_tokens_decoder": stated, "model_max_length": int(1e30)})
    assert tokenizer.added_tokens == {"<s>": 260, "<t>": 300, "abab": 258}, "the vocabulary has its own ids"
    assert tokenizer.encode("a<t>b") == [VOCAB["a"], 300, VOCAB["b"]]
    for nothing in ({}, {"added_tokens_decoder": None}, {"add_bos_token": False, "chat_template": ["x"]}):
        assert beside(tmp_path, nothing).fingerprint == load(tmp_path, DOCUMENT).fingerprint
    assert not recwarn


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (["x"], "added_tokens_decoder is not a map"),
        ("x", "added_tokens_decoder is not a map"),
        ({"x": ADDED}, "'x' is not an id"),
        ({"300": 5}, "'5' is not an added token"),
        ({"300": {"content": []}}, "is not an added token"),
        ({"300": {"content": "<t>", "lstrip": True}}, "the added token '<t>' asks for lstrip"),
        ({"260": {"content": "<t>"}}, "duplicate vocabulary id 260"),
    ],
)
def test_added_tokens_of_the_config_that_cannot_be_followed_are_named(tmp_path, stated, message):
    with pytest.raises(ZImageError, match=message):
        beside(tmp_path, {"added_tokens_decoder": stated})


@pytest.mark.parametrize("name", tokenizer_json.NOT_FOLLOWED)
def test_settings_of_the_config_that_are_not_followed_are_told(tmp_path, name):
    with pytest.warns(UserWarning, match=f"{name} is true and not followed"):
        assert beside(tmp_path, {name: True}).encode(TEXT) == TEXT_IDS


def test_a_way_of_cutting_words_that_a_gguf_cannot_name_is_refused_there(tmp_path):
    from zimage_core.export.vocabularies import vocabulary_keys

    load(tmp_path, changed("model.ignore_merges", True))
    with pytest.raises(Unsupported, match=r"GGUF has no name for how .* splits text"):
        vocabulary_keys(tokenizer_json.read_folder(tmp_path), 300)


def test_composition_follows_the_file(tmp_path):
    assert load(tmp_path, DOCUMENT).encode("e\u0301") == load(tmp_path, DOCUMENT).encode("\u00e9")
    plain = load(tmp_path, changed("normalizer", None))
    assert plain.encode("e\u0301") != plain.encode("\u00e9")


REFUSED = {
    "normalizer": [
        ("normalizer", {"type": "Lowercase"}, "normalizer 'Lowercase'"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////"}, "normalizer 'Precompiled'"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 24}, "normalizer 'Sequence'"),
        ("normalizer", "NFC", "normalizer 'NFC'"),
    ],
    "pre_tokenizer": [
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "pre_tokenizer 'FixedLength'"),
        ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer 'Metaspace'"),
        ("pre_tokenizer", 7, "pre_tokenizer '7'"),
        ("pre_tokenizer", SPLIT, "without a final ByteLevel, pre_tokenizer 'Split'"),
        ("pre_tokenizer", SPLIT | {"pattern": {"Regex": ""}}, "with the regex pattern ''"),
        ("pre_tokenizer", SPLIT | {"pattern": {"Regex": "(a|a)*$b"}}, r"with the regex pattern '\(a\|a"),
        ("pre_tokenizer", SPLIT | {"pattern": {"String": " "}}, "with the regex pattern 'None'"),
        ("pre_tokenizer", SPLIT | {"pattern": []}, "with the regex pattern 'None'"),
        ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}, "add_prefix_space"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "add_prefix_space"),
        ("pre_tokenizer", BYTE_LEVEL, "with the regex patterns"),
        ("pre_tokenizer", BYTE_LEVEL | {"evil": True}, "pre_tokenizer 'ByteLevel'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "pre_tokenizer 'Sequence'"),
        ("pre_tokenizer", {"type": "Sequence"}, "pre_tokenizer 'Sequence'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT, SPLIT, BYTE_LEVEL]}, "patterns"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT | {"invert": True}, BYTE_LEVEL]},
         "Split with .*invert"),
    ],
    "output": [
        ("post_processor", {"type": "TemplateProcessing"}, "post_processor 'TemplateProcessing'"),
        ("post_processor", ADDS, "post_processor 'TemplateProcessing'"),
        ("post_processor", TEMPLATE | {"single": 5}, "post_processor 'TemplateProcessing'"),
        ("post_processor", TEMPLATE | {"single": [FOR_A, FOR_A]}, "post_processor 'TemplateProcessing'"),
        ("post_processor", {"type": "Sequence", "processors": [BYTE_LEVEL, ADDS]}, "'TemplateProcessing'"),
        ("post_processor", {"type": "BertProcessing"}, "post_processor 'BertProcessing'"),
        ("decoder", {"type": "Strip"}, "decoder 'Strip'"),
        ("decoder", BYTE_LEVEL | {"use_regex": 1}, "decoder 'ByteLevel'"),
        ("truncation", 5, "truncation '5'"),
    ],
    "model": [
        ("model.type", "Unigram", "model type 'Unigram'"),
        ("model.type", "Evil\x1b[2J", r"model type 'Evil\\x1b\[2J'"),
        ("model.type", None, "model type 'None'"),
        ("model.dropout", 0.5, "model.dropout '0.5'"),
        ("model.dropout", 2.0, "model.dropout '2.0'"),
        ("model.byte_fallback", True, "model.byte_fallback 'True'"),
        ("model.fuse_unk", True, "model.fuse_unk"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix '##'"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix '</w>'"),
        ("model.ignore_merges", "yes", "model.ignore_merges 'yes'"),
        ("model.evil", 1, "in model, the unexpected field 'evil'"),
        ("chat_template", "{{ x }}", "in the file, the unexpected field 'chat_template'"),
    ],
    "added": [
        ("added_tokens", [ADDED | {flag: True}], f"'<s>' asks for {flag}")
        for flag in ("lstrip", "rstrip", "single_word")
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [row for rows in REFUSED.values() for row in rows],
    ids=lambda v: str(v)[:40],
)
def test_anything_else_is_refused_by_name(tmp_path, path, value, message):
    with pytest.raises(Unsupported, match=message) as caught:
        load(tmp_path, changed(path, value))
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()


DAMAGED = [
    (changed("model", None), "the model is missing"),
    (changed("model", []), "expected as model, found list"),
    (changed("model.vocab", ["a"]), "model.vocab is missing or invalid"),
    (changed("model.vocab", None), "model.vocab is missing or invalid"),
    (changed("model.vocab", {}) | {"added_tokens": []}, "the vocabulary is empty"),
    (changed("model.vocab", {"a": 0, "b": 0, "ab": 1}), "duplicate vocabulary id 0: 'a' and 'b'"),
    (changed("model.vocab", {"a": 1 << 24}), "id 16777216 of 'a' is out of range"),
    (changed("model.vocab", {"a": -1}), "id -1 of 'a' is out of range"),
    (changed("model.vocab", {"a": True}), "id True of 'a' is out of range"),
    (changed("model.vocab", {"a": "0"}), "id 0 of 'a' is out of range"),
    (changed("model.vocab", {"a" * 65537: 0}), "token 0 is 65537 characters long"),
    (changed("model.vocab", {"\ud800": 0}), "lone surrogate"),
    (changed("model.merges", {}), "model.merges is invalid: a list"),
    (changed("model.merges", ["ab"]), "merge 0 is 'ab', two tokens"),
    (changed("model.merges", [["a", "b", "c"]]), "merge 0 .* two tokens"),
    (changed("model.merges", [["a", 1]]), "merge 0 .* two tokens"),
    (changed("model.merges", ["a "]), "merge 0 .* two tokens"),
    (changed("model.merges", [7]), "merge 0 is '7', two tokens"),
    (
        changed("model.merges", [["a", "b"], ["zz", "a"]]),
        "merge 1, 'zz' . 'a': 'zz' is not in the vocabulary",
    ),
    (changed("model.merges", [["a", "c"]]), "'ac' is not in the vocabulary"),
    (changed("model.merges", [["abab", "abab"]]), "'abababab' is not in the vocabulary"),
    (changed("model.unk_token", "<unk>"), "unk_token '<unk>' is not in the vocabulary"),
    (changed("model.unk_token", 3), "model.unk_token is not a string"),
    (changed("added_tokens", {}) | {"added_tokens": {"a": 1}}, "added_tokens is invalid: a list"),
    (changed("added_tokens", [ADDED | {"content": ""}]), "added token with id 260 is empty"),
    (
        changed("added_tokens", [ADDED | {"content": "ab"}]),
        "added token 'ab' has id 260, in the vocabulary 256",
    ),
    (changed("added_tokens", [ADDED, ADDED | {"id": 261}]), "duplicate added token '<s>'"),
    (changed("added_tokens", [ADDED, ADDED | {"content": "<t>"}]), "duplicate vocabulary id 260"),
    (changed("added_tokens", [ADDED | {"id": None}]), "id None of '<s>' is out of range"),
    (changed("added_tokens", [{"content": "<s>"}]), "id None of '<s>' is out of range"),
    (changed("added_tokens", [{"id": 260}]), "not an added token with content and id"),
    (changed("added_tokens", ["<s>"]), "not an added token with content and id"),
    (changed("added_tokens", [ADDED | {"evil": 1}]), "not an added token with content and id"),
    (changed("truncation", {"max_length": 0}), "truncation: max_length is 0"),
    (changed("truncation", {"max_length": 4, "stride": 4}), "stride 4 is not below max_length 4"),
    (changed("truncation", {"max_length": "4"}), "truncation: max_length is 4, not in"),
    (changed("padding", {"pad_to_multiple_of": 0}), "padding: pad_to_multiple_of is 0"),
    (changed("padding", {"strategy": {"Fixed": 1 << 34}}), "padding: strategy.Fixed is 17179869184"),
    (DEEP, "nested more than 64 deep"),
    (b'{"model":' * 100_000, "nested more than 64 deep"),
    (b"", "the file is empty"),
    (b"hello", "not valid JSON"),
    (b"[]", "a JSON object was expected, found list"),
    (b"{}", "the model is missing"),
    (b'{"a": 1, "a": 2}', "duplicate JSON key 'a'"),
    (b'{"a": NaN}', "invalid JSON number NaN as 'a'"),
    (b'{"b": {"a": [1, [-Infinity]]}}', "invalid JSON number Infinity as 'a'"),
    (b'{"a": ' + b"9" * 5000 + b"}", "number of 5000 digits is out of range"),
    (b'{"a": "\xff"}', "in UTF-8: byte 7 is invalid"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    (json.dumps(DOCUMENT).encode()[:200], "not valid JSON"),
]


@pytest.mark.parametrize(("document", "message"), DAMAGED, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_a_damaged_file_is_named_with_its_fault(tmp_path, document, message):
    with pytest.raises(BadFile, match=message) as caught:
        load(tmp_path, document)
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).isprintable()


def test_more_added_tokens_than_anyone_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_json, "MAX_ADDED", 1)
    assert load(tmp_path, DOCUMENT).added_tokens
    with pytest.raises(BadFile, match="added_tokens: 2 tokens, the limit is a count of 1"):
        load(tmp_path, changed("added_tokens", [ADDED, ADDED]))


def test_what_is_not_a_file_is_named(tmp_path):
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    for path, message in [
        (tmp_path, "a directory, not a regular file"),
        (fifo, "a FIFO, not a regular file"),
        ("/dev/null", "a device, not a regular file"),
        (tmp_path / "absent.json", "no such file"),
        ("a\0b", "holds a NUL character"),
    ]:
        with pytest.raises(BadFile, match=message):
            Tokenizer.from_json(path)


def test_a_file_larger_than_any_tokenizer_is_not_read(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(untrusted.MAX_BYTES + 1)
    with pytest.raises(BadFile, match="larger than 100000000 bytes"):
        Tokenizer.from_json(path)


def test_any_change_of_bytes_gives_a_tokenizer_or_one_of_our_errors(tmp_path):
    sound = json.dumps(DOCUMENT | {"added_tokens": [ADDED]}).encode()
    rng = random.Random(20)
    refused = 0
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            at, size = rng.randrange(len(data)), rng.randint(0, 12)
            data[at : at + size] = rng.randbytes(rng.choice([0, 1, size]))
        try:
            load(tmp_path, bytes(data)).encode("abab 12 é<s>")
        except ZImageError:
            refused += 1
    assert 100 < refused < 400


def test_a_text_with_bytes_that_the_vocabulary_lacks_warns(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []}
    tokenizer = load(tmp_path, changed("model", model))
    assert tokenizer.encode("ba") == [1, 0]
    with pytest.warns(UserWarning, match="characters that the vocabulary lacks"):
        assert tokenizer.encode("bxa") == [1, 0]
