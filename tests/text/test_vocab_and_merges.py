"""vocab.json + merges.txt, and folders: the older form of the same vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_tokenizer import ADDED, DOCUMENT, VOCAB, load
from zimage_core.errors import BadFile
from zimage_core.text.tokenizer import Tokenizer


def write_pair(
    folder: Path, vocab: Any = VOCAB, merges: str = "#version: 0.2\na b\nĠ a\r\nab ab\n\n"
) -> None:
    folder.joinpath("vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    folder.joinpath("merges.txt").write_text(merges, encoding="utf-8", newline="")


def test_vocab_and_merges_are_the_same_vocabulary(tmp_path):
    write_pair(tmp_path)
    config = {"added_tokens_decoder": {"260": ADDED | {"special": True}}}
    del config["added_tokens_decoder"]["260"]["id"]
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).fingerprint == load(tmp_path, DOCUMENT).fingerprint
    names = (tmp_path / name for name in ("vocab.json", "merges.txt"))
    assert not Tokenizer.from_vocab_merges(*names).added_tokens


def test_added_tokens_json_stands_in_for_the_config(tmp_path):
    write_pair(tmp_path)
    tmp_path.joinpath("added_tokens.json").write_text('{"<s>": 260}', encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).added_tokens == {"<s>": 260}
    tmp_path.joinpath("added_tokens.json").write_text('{"<s>": "x"}', encoding="utf-8")
    with pytest.raises(BadFile):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_prefers_tokenizer_json_and_may_be_the_one_above(tmp_path):
    inner = tmp_path / "tokenizer"
    inner.mkdir()
    write_pair(inner)
    assert Tokenizer.from_folder(tmp_path).added_tokens == {}
    load(inner, DOCUMENT)
    assert Tokenizer.from_folder(tmp_path).added_tokens == {"<s>": 260}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": []}, "added_tokens_decoder is not a map"),
        ({"added_tokens_decoder": {"x": ADDED}}, "added_tokens_decoder: 'x' is not an id"),
        ({"added_tokens_decoder": {"٣": ADDED}}, "is not an id"),
        ({"added_tokens_decoder": {"-1": ADDED}}, "'-1' is not an id"),
        ({"added_tokens_decoder": {"260": "<s>"}}, "not an added token"),
    ],
)
def test_a_strange_tokenizer_config_is_refused(tmp_path, config, message):
    write_pair(tmp_path)
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BadFile, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_merges_file_with_a_strange_line_is_refused(tmp_path):
    write_pair(tmp_path, merges="a b\nabc\n")
    with pytest.raises(BadFile, match=r"merges\.txt: merge 1 is 'abc'"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_was_wanted(tmp_path):
    with pytest.raises(BadFile, match="no tokenizer in this folder: tokenizer"):
        Tokenizer.from_folder(tmp_path)
