"""Reads a vocabulary from tokenizer.json, or from vocab.json, merges.txt and tokenizer_config.json.

Only the vocabulary, the merges and the added tokens are used. The other settings of a tokenizer.json must
match what this package does: a file with another setting is refused, because ignoring it would give other ids
than those the model was trained with. A setting that is written out and does nothing, such as a template of
the text alone, is accepted. Padding and truncation are settings of a past session, not of the model: they are
checked for plausibility and ignored.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NoReturn

from zimage_core.errors import BadFile, Unsupported, printable
from zimage_core.files import json_kinds
from zimage_core.files.untrusted import lines, read_json, read_text
from zimage_core.text.pretokenizers import (
    DIGIT,
    FALLBACK,
    GPT2,
    KNOWN_PATTERNS,
    PRE_TOKENIZERS,
    PreTokenizer,
)
from zimage_core.text.vocabulary import Vocabulary, split_merges

# All fields that a file may have; any other is refused.
TOP = {
    *("version", "truncation", "padding", "added_tokens", "normalizer"),
    *("pre_tokenizer", "post_processor", "decoder", "model"),
}
MODEL = {
    *("type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"),
}
ADDED = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
BYTE_LEVEL = {"type", "add_prefix_space", "trim_offsets", "use_regex"}
NOT_FOLLOWED = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens")
"""Settings of tokenizer_config.json that would change ids; Qwen's tokenizer has none of them on."""
MAX_ADDED = 100_000
MAX_LENGTH = 1 << 24


def read_tokenizer_json(path: str | PathLike[str]) -> Vocabulary:
    """Read the vocabulary of a tokenizer.json, as the library `tokenizers` writes it.

    Raises:
        BadFile: The file is damaged or contradicts itself.
        Unsupported: The file needs a model, normalizer, pre-tokenizer, post-processor or decoder that a
            byte-level BPE like Qwen's does not have; the message names it.
    """
    return _Reader(fspath(path)).read()


class _Reader:
    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> Vocabulary:
        data = read_json(self.path)
        if "model" not in data and (other := json_kinds.name_of(data)):
            hint = "give tokenizer.json or the folder that holds it"
            if other == json_kinds.VOCABULARY:
                hint = "give the folder that also holds merges.txt"
            raise BadFile(self.path, f"this is {other}, not a tokenizer.json", hint)
        if data and not data.keys() & TOP:
            keys = printable(", ".join(list(data)[:5]), 120)
            raise BadFile(self.path, f"JSON without any field of a tokenizer.json; it has {keys}")
        self._only(data, TOP, "the file")
        model = self._model(data.get("model"))
        self._ranges("truncation", data.get("truncation"), ("max_length", "stride"))
        self._ranges("padding", data.get("padding"), ("pad_to_multiple_of", "pad_id"))
        for part in _steps(data.get("post_processor"), "processors"):
            if not self._byte_level(part) and not _adds_nothing(part):
                self._refuse("post_processor", part)
        for part in _steps(data.get("decoder"), "decoders"):
            if not self._byte_level(part) and part != {"type": "Fuse"}:
                self._refuse("decoder", part)
        return Vocabulary(
            path=self.path,
            tokens=self._vocab(model),
            merges=split_merges(self._list(model.get("merges", []), "model.merges"), self.path),
            added=self._added(self._list(data.get("added_tokens") or [], "added_tokens")),
            pre=replace(
                self._pre(data.get("normalizer"), data.get("pre_tokenizer")),
                ignore_merges=bool(model.get("ignore_merges")),
            ),
            unknown=model.get("unk_token"),
        )

    def _model(self, model: Any) -> dict[str, Any]:
        if model is None:
            self._fail("the model is missing")
        if not isinstance(model, dict):
            self._fail(f"a JSON object was expected as model, found {type(model).__name__}")
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind != "BPE":
            raise Unsupported(
                f"{printable(self.path)}: model type '{printable(kind, 60)}' is unknown here, its vocabulary"
                " is not used; expected model type 'BPE', as Qwen's tokenizer has"
            )
        self._only(model, MODEL, "model")
        if model.get("dropout"):
            self._refuse("model.dropout", model["dropout"])
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name) not in (None, ""):
                self._refuse(f"model.{name}", model[name])
        for name in ("byte_fallback", "fuse_unk"):
            if model.get(name) not in (None, False):
                self._refuse(f"model.{name}", model[name])
        if model.get("ignore_merges") not in (None, True, False):
            self._refuse("model.ignore_merges", model["ignore_merges"])
        if not isinstance(model.get("unk_token"), (str, type(None))):
            self._fail("model.unk_token is not a string of the vocabulary")
        return model

    def _vocab(self, model: dict[str, Any]) -> dict[str, int]:
        vocab = model.get("vocab")
        if not isinstance(vocab, dict):
            self._fail("model.vocab is missing or invalid: a map of token to id was expected")
        return vocab

    def _added(self, items: list[Any]) -> dict[str, int]:
        if len(items) > MAX_ADDED:
            self._fail(f"added_tokens: {len(items)} tokens, the limit is a count of {MAX_ADDED}")
        return added_tokens(
            ((item.get("id") if isinstance(item, dict) else None, item) for item in items), self.path
        )

    def _ranges(self, name: str, value: Any, fields: tuple[str, ...]) -> None:
        """Refuse impossible lengths in padding or truncation, which are ignored otherwise."""
        if value is None:
            return
        if not isinstance(value, dict):
            self._refuse(name, value)
        strategy = value.get("strategy")
        numbers = {field: value.get(field) for field in fields}
        if isinstance(strategy, dict):
            numbers |= {f"strategy.{printable(key, 20)}": item for key, item in strategy.items()}
        for field, number in numbers.items():
            low = 0 if field in ("stride", "pad_id") else 1
            if number is not None and (type(number) is not int or not low <= number <= MAX_LENGTH):
                self._fail(f"{name}: {field} is {printable(number, 40)}, not in {low}..{MAX_LENGTH}")
        if (numbers.get("stride") or 0) >= (numbers.get("max_length") or MAX_LENGTH + 1):
            self._fail(f"{name}: stride {numbers['stride']} is not below max_length {numbers['max_length']}")

    def _pre(self, normalizer: Any, pre_tokenizer: Any) -> PreTokenizer:
        if _steps(normalizer, "normalizers") not in ([], [{"type": "NFC"}]):
            self._refuse("normalizer", normalizer)
        if pre_tokenizer is None:
            return PRE_TOKENIZERS["qwen2"]  # the file names none: Qwen's own
        steps = _steps(pre_tokenizer, "pretokenizers")
        if not steps:
            self._refuse("pre_tokenizer", pre_tokenizer)
        *splits, last = steps
        if not self._byte_level(last):
            self._pattern(last)  # raises an error that names an unknown step
            self._refuse("without a final ByteLevel, pre_tokenizer", pre_tokenizer)
        patterns = tuple(self._pattern(step) for step in splits)
        if last.get("add_prefix_space", True):
            self._refuse("pre_tokenizer", "ByteLevel with add_prefix_space")
        if last.get("use_regex", True):
            patterns += (GPT2,)
        if patterns not in KNOWN_PATTERNS:
            self._refuse("pre_tokenizer with the regex patterns", patterns)
        return PreTokenizer(patterns, nfc=bool(_steps(normalizer, "normalizers")))

    def _pattern(self, step: Any) -> str:
        """The regular expression of one step, if it is in the table of pre-tokenizers."""
        if step == {"type": "Digits", "individual_digits": True}:
            return DIGIT
        if not isinstance(step, dict) or step.get("type") != "Split":
            self._refuse("pre_tokenizer", step)
        regex = step["pattern"].get("Regex") if isinstance(step.get("pattern"), dict) else None
        if not any(regex in patterns for patterns in KNOWN_PATTERNS):
            self._refuse("pre_tokenizer Split with the regex pattern", regex)
        rest = {key: value for key, value in step.items() if key not in ("type", "pattern")}
        # a pattern that matches every character leaves nothing between its matches to be removed
        all_matched = regex not in (DIGIT, *FALLBACK) and rest == {"behavior": "Removed", "invert": True}
        if rest != {"behavior": "Isolated", "invert": False} and not all_matched:
            self._refuse("pre_tokenizer Split with", rest)
        return str(regex)

    def _byte_level(self, part: Any) -> bool:
        return (
            isinstance(part, dict)
            and part.get("type") == "ByteLevel"
            and part.keys() <= BYTE_LEVEL
            and all(type(value) is bool for key, value in part.items() if key != "type")
        )

    def _list(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            self._fail(f"{name} is invalid: a list was expected")
        return value

    def _only(self, value: dict[str, Any], known: set[str], where: str) -> None:
        for key in value:
            if key not in known:
                self._refuse(f"in {where}, the unexpected field '{printable(key, 60)}'", value[key])

    def _refuse(self, name: str, value: Any) -> NoReturn:
        kind = value.get("type", value) if isinstance(value, dict) else value
        raise Unsupported(
            f"{printable(self.path)}: {name} '{printable(kind, 120)}' does not match a byte-level BPE like"
            " Qwen's and is not supported; use the tokenizer that came with the text encoder"
        )

    def _fail(self, fault: str) -> NoReturn:
        raise BadFile(self.path, fault)


def _steps(part: Any, name: str) -> list[Any]:
    """The steps of a part: those of a Sequence, also nested, or the part itself; empty for None."""
    inner = part.get(name) if isinstance(part, dict) and part.get("type") == "Sequence" else None
    if isinstance(inner, list):
        return [step for each in inner for step in _steps(each, name)]
    return [] if part is None else [part]


def _adds_nothing(part: Any) -> bool:
    """Whether a post-processor is a template of the text alone; transformers 5 writes one."""
    if not isinstance(part, dict) or part.get("type") != "TemplateProcessing":
        return False
    match part.get("single"):
        case [{"Sequence": {"id": "A"}}]:
            return True
    return False


def added_tokens(items: Any, path: str, known: Collection[str] = ()) -> dict[str, int]:
    """Read added tokens from (id, description) pairs; the result is content -> id.

    How `known` tokens are to be matched was read elsewhere and is not read here.

    Raises:
        BadFile: A description is damaged, or a content occurs twice.
        Unsupported: A token is not matched literally: it strips spaces or matches whole words only.
    """
    added: dict[str, int] = {}
    for number, item in items:
        content = item.get("content") if isinstance(item, dict) else None
        if not isinstance(content, str) or not item.keys() <= ADDED | {"__type"}:
            raise BadFile(
                path, f"added_tokens: '{printable(item, 80)}' is not an added token with content and id"
            )
        for flag in ("lstrip", "rstrip", "single_word"):
            if item.get(flag) and content not in known:
                raise Unsupported(
                    f"{printable(path)}: the added token '{printable(content, 60)}' asks for {flag}; added"
                    " tokens are matched literally here"
                )
        if content in added:
            raise BadFile(path, f"duplicate added token '{printable(content, 60)}'")
        added[content] = number
    return added


def read_vocab_merges(
    vocab: str | PathLike[str],
    merges: str | PathLike[str],
    config: str | PathLike[str] | None = None,
    pre: str = "qwen2",
    added: str | PathLike[str] | None = None,
) -> Vocabulary:
    """Read a vocabulary from the older pair of files, vocab.json and merges.txt.

    Args:
        vocab: Path of vocab.json.
        merges: Path of merges.txt.
        config: Path of tokenizer_config.json; only its added tokens are read.
        pre: Row of `PRE_TOKENIZERS`, which these files do not name.
        added: Path of added_tokens.json, used if `config` has no added tokens.

    Raises:
        BadFile: A file is damaged.
    """
    rules = [line for line in lines(read_text(merges)) if line]
    if rules and rules[0].startswith("#version"):
        del rules[0]
    extra: dict[str, int] = {}
    if added is not None:
        pairs = ((number, {"content": text}) for text, number in read_json(added).items())
        extra = added_tokens(pairs, fspath(added))
    if config is not None:
        extra = _stated_tokens(config) or extra
    return Vocabulary(
        path=fspath(vocab),
        tokens=read_json(vocab),
        merges=split_merges(rules, fspath(merges)),
        added=extra,
        pre=PRE_TOKENIZERS[pre],
    )


def _stated_tokens(config: str | PathLike[str], known: Collection[str] = ()) -> dict[str, int]:
    """The added tokens of a tokenizer_config.json that are not `known`; warns of settings not followed."""
    data = read_json(config)
    asked = [name for name in NOT_FOLLOWED if data.get(name) is True]
    if asked:
        warnings.warn(
            f"{printable(config)}: {' and '.join(asked)} is true and not followed; "
            "Z-Image's prompts are encoded as they are written",
            UserWarning,
            stacklevel=2,
        )
    table = {} if data.get("added_tokens_decoder") is None else data["added_tokens_decoder"]
    if not isinstance(table, Mapping):
        raise BadFile(config, "added_tokens_decoder is not a map of id to token")
    found = added_tokens(((_number(key, config), item) for key, item in table.items()), fspath(config), known)
    return {text: number for text, number in found.items() if text not in known}


def _number(key: str, path: str | PathLike[str]) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 8):
        raise BadFile(path, f"added_tokens_decoder: '{printable(key, 40)}' is not an id")
    return int(key)


def read_folder(folder: str | PathLike[str]) -> Vocabulary:
    """Read the vocabulary in a tokenizer folder, or in a model folder that holds one as `tokenizer/`.

    tokenizer.json is preferred to vocab.json with merges.txt; added tokens that only tokenizer_config.json
    has are taken from it. A link without target counts as the file: reading it says what is missing.

    Raises:
        BadFile: The folder has neither, or a file is damaged.
    """
    for place in (Path(folder), Path(folder) / "tokenizer"):
        config, added = (
            path if os.path.lexists(path) else None
            for path in (place / "tokenizer_config.json", place / "added_tokens.json")
        )
        if os.path.lexists(place / "tokenizer.json"):
            found = read_tokenizer_json(place / "tokenizer.json")
            more = {} if config is None else _stated_tokens(config, found.added)
            # a token of the vocabulary keeps its id there, as in transformers
            more = {text: found.tokens.get(text, number) for text, number in more.items()}
            return replace(found, added={**found.added, **more})
        vocab, merges = place / "vocab.json", place / "merges.txt"
        if os.path.lexists(vocab) and os.path.lexists(merges):
            return read_vocab_merges(vocab, merges, config, added=added)
    raise BadFile(
        folder, "no tokenizer in this folder: tokenizer.json, or vocab.json with merges.txt, was expected"
    )
