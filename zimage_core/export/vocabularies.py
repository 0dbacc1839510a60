"""The tokenizer on its way between the keys of a GGUF and the files of a folder.

Names of keys are llama.cpp's (gguf-py/gguf/constants.py); a chat template is text for other programs, this
library never evaluates one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from zimage_core.errors import BadFile, Unsupported, printable
from zimage_core.files.untrusted import read_file, read_json, read_text
from zimage_core.text.gguf_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED
from zimage_core.text.pretokenizers import PRE_TOKENIZERS
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.text.tokenizer_json import read_folder
from zimage_core.text.vocabulary import Vocabulary
from zimage_core.weights.folder import has_tokenizer
from zimage_core.weights.gguf_writer import TypedArray
from zimage_core.weights.source import WeightFile

TOKENS_KEY = "tokenizer.ggml.tokens"
TEMPLATE_KEY = "tokenizer.chat_template"
FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""The files of a tokenizer folder."""

_ROLES = {"bos": "<|endoftext|>", "eos": "<|im_end|>", "padding": "<|endoftext|>"}
"""Role -> Qwen's token for it, where tokenizer_config.json names none."""
_CONFIG_NAMES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
"""Role in a GGUF key -> name in tokenizer_config.json."""
_FLAGS = ("add_bos_token", "add_eos_token")
_MAX_TEMPLATE = 1 << 20


def tokenizer_folder(folder: Path) -> Path | None:
    """The folder of the tokenizer that belongs to the text encoder in `folder`, or None."""
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if has_tokenizer(place):
            return place
    return None


def tokenizer_place(file: WeightFile, folder: Path) -> Path | None:
    """What holds the tokenizer of a text encoder: its GGUF itself, or a folder at `folder` or the file."""
    if TOKENS_KEY in file.metadata:
        return Path(file.path)
    return tokenizer_folder(folder) or tokenizer_folder(Path(file.path).parent)


def tell_of_tokenizer(place: Path | None, log: Callable[[str], None]) -> None:
    """Log where the tokenizer is that a safetensors file cannot hold."""
    if place is not None:
        log(f"a safetensors file holds no tokenizer; give this one beside it: --tokenizer {printable(place)}")


# --- folder -> GGUF ------------------------------------------------------------------------


def folder_keys(folder: Path, rows: int) -> dict[str, Any]:
    """The keys of a GGUF for the tokenizer in a folder; the vocabulary is padded to `rows` tokens.

    Raises:
        BadFile: The tokenizer is damaged.
        Unsupported: It splits text in a way that has no name in GGUF.
    """
    config = _config(folder)
    added = config.get("added_tokens_decoder")
    items = added.values() if isinstance(added, Mapping) else ()
    special = {
        str(item.get("content")) for item in items if isinstance(item, Mapping) and item.get("special")
    }
    vocabulary = read_folder(folder)
    keys = vocabulary_keys(vocabulary, rows, special)
    ids = vocabulary.checked()
    for role, name in _CONFIG_NAMES.items():
        if (number := ids.get(_content(config.get(name)))) is not None:
            keys[f"tokenizer.ggml.{role}_token_id"] = number
    keys |= {f"tokenizer.ggml.{name}": config[name] for name in _FLAGS if isinstance(config.get(name), bool)}
    return keys | _template_keys(folder, config)


def vocabulary_keys(vocabulary: Vocabulary, rows: int, special: Collection[str] = ()) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` of a byte-level BPE, padded to the rows of the embedding.

    Args:
        vocabulary: The vocabulary.
        rows: Number of embeddings of the text encoder.
        special: Added tokens that are control tokens, besides those that begin with `<|`.

    Raises:
        BadFile: The vocabulary is inconsistent, or has more tokens than the embedding has rows.
        Unsupported: It splits text in a way that has no name in GGUF.
    """
    ids = vocabulary.checked()
    if max(ids.values()) >= rows:
        raise BadFile(
            vocabulary.path, f"{max(ids.values()) + 1} tokens, the text encoder has {rows} embeddings"
        )
    texts, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, number in ids.items():
        texts[number] = text
        types[number] = _token_type(text, text in vocabulary.added, special)
    names = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}
    if vocabulary.pre not in names:
        where = printable(vocabulary.path)
        raise Unsupported(f"GGUF has no name for how {where} splits text (pre-tokenizer and normalizer)")
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[vocabulary.pre],
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": TypedArray(types, "i32"),
        "tokenizer.ggml.merges": TypedArray((f"{a} {b}" for a, b in vocabulary.merges), "string"),
    }
    keys |= {f"tokenizer.ggml.{role}_token_id": ids[text] for role, text in _ROLES.items() if text in ids}
    return keys | {"tokenizer.ggml.add_bos_token": False}


def _token_type(text: str, added: bool, special: Collection[str]) -> int:
    if not added:
        return NORMAL
    return CONTROL if text.startswith("<|") or text in special else USER_DEFINED


def _config(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a folder; empty if there is none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str:
    """The text of a token in tokenizer_config.json, which is a string or an object; "" for none."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else ""


def _template_keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates of a folder: the usual one, and others with a name each."""
    found: Any = config.get("chat_template")
    if (path := folder / "chat_template.jinja").is_file():
        found = read_text(path)
    elif found is None and (path := folder / "chat_template.json").is_file():
        found = read_json(path).get("chat_template")
    items = found if isinstance(found, list) else [{"name": "default", "template": found}]
    texts = {
        str(item.get("name")): item["template"]
        for item in items
        if isinstance(item, Mapping) and isinstance(item.get("template"), str)
    }
    texts = {name: text for name, text in texts.items() if len(text) <= _MAX_TEMPLATE}
    keys: dict[str, Any] = {TEMPLATE_KEY: texts.pop("default")} if "default" in texts else {}
    if texts:
        keys["tokenizer.chat_templates"] = TypedArray(texts, "string")
    return keys | {f"{TEMPLATE_KEY}.{name}": text for name, text in texts.items()}


# --- GGUF or folder -> folder --------------------------------------------------------------


def copied_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer folder: name -> content."""
    return {name: read_file(folder / name) for name in FILES if (folder / name).is_file()}


def tokenizer_files(tokenizer: Tokenizer, metadata: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The files of a tokenizer folder: name -> content.

    Args:
        tokenizer: The tokenizer.
        metadata: Keys of the GGUF that it came from: roles, flags and chat templates.

    Raises:
        Unsupported: The vocabulary is SentencePiece's.
    """
    keys = metadata or {}
    document = json.loads(tokenizer.to_json())
    tokens, types = keys.get(TOKENS_KEY), keys.get("tokenizer.ggml.token_type")
    texts = {number: text for text, number in document["model"]["vocab"].items()}
    for item in document["added_tokens"]:
        kind = types[item["id"]] if types is not None else _token_type(item["content"], True, ())
        item["special"] = kind == CONTROL

    def role(name: str) -> str | None:
        number = keys.get(f"tokenizer.ggml.{name}_token_id")
        if tokens is None:
            return _ROLES.get(name) if _ROLES.get(name) in tokenizer.added_tokens else None
        return texts.get(number) if isinstance(number, int) else None

    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        **{name: keys[f"tokenizer.ggml.{name}"] for name in _FLAGS if f"tokenizer.ggml.{name}" in keys},
        **{theirs: role(ours) for ours, theirs in _CONFIG_NAMES.items()},
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(item["id"]): {name: value for name, value in item.items() if name != "id"}
            for item in document["added_tokens"]
        },
    }
    if templates := _templates(keys):
        config["chat_template"] = templates
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _templates(keys: Mapping[str, Any]) -> Any:
    """The value of `chat_template` in tokenizer_config.json: a text, a list of named texts, or None."""
    usual = keys.get(TEMPLATE_KEY)
    named = [name for name in keys.get("tokenizer.chat_templates", ()) if f"{TEMPLATE_KEY}.{name}" in keys]
    if not named:
        return usual
    first = [] if usual is None else [{"name": "default", "template": usual}]
    return first + [{"name": name, "template": keys[f"{TEMPLATE_KEY}.{name}"]} for name in named]
