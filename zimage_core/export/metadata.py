"""Metadata keys of written GGUF files: the network, its origin and its vocabulary.

Names are llama.cpp's (gguf-py/gguf/constants.py), except `zimage.*`, which other readers ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from zimage_core import __version__
from zimage_core.config import TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadFile, Unsupported, ZImageError, printable
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.export.recipes import Recipe
from zimage_core.text.gguf_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED
from zimage_core.text.pretokenizers import PRE_TOKENIZERS
from zimage_core.text.tokenizer_json import read_folder
from zimage_core.text.vocabulary import Vocabulary
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.gguf_writer import QUANTIZATION_VERSION, TypedArray, raw_keys

TRANSFORMER_ARCH = "lumina2"
"""Architecture of every published Z-Image GGUF; ComfyUI-GGUF accepts no other name."""

_TOLD = ("axes_dims", "axes_lens", "rope_theta", "norm_eps", "t_scale")
"""Fields of a transformer that do not follow from shapes; weights/infer.py reads them as `zimage.*`."""
_REPLACED = (
    "general.file_type", "general.quantization_version", "general.alignment", "quantize.", "split.",
    "comfy.gguf.orig_shape.",
)  # fmt: skip
"""Prefixes of a source's keys that are written anew or do not apply to the new file."""
_MAX_TEMPLATE = 1 << 20


def gguf_metadata(
    source: Checkpoint, recipe: Recipe | None = None, imatrix: str = "", file_type: int | None = None
) -> dict[str, Any]:
    """All keys for a GGUF made from `source`, in order.

    Args:
        source: The checkpoint. The keys of a GGUF text encoder are kept, including its tokenizer.
        recipe: The recipe of the types; None if the source's types were kept.
        imatrix: Name of the importance matrix; "" for none.
        file_type: llama.cpp's number for the mix; None if it has none.

    Raises:
        BadFile: The tokenizer beside the source is damaged.
    """
    keys: dict[str, Any] = {}
    if isinstance(source.file, GGUFFile):
        keys = {k: v for k, v in raw_keys(source.file).items() if not k.startswith(_REPLACED)}
    config = source.config
    if isinstance(config, TransformerConfig):
        keys = {"general.architecture": TRANSFORMER_ARCH, **_without(keys, "general.architecture")}
        keys |= _transformer_keys(config)
    elif isinstance(config, TextEncoderConfig) and "general.architecture" not in keys:
        keys = {"general.architecture": config.arch, **keys, **_text_keys(config, source.stated)}
        keys |= _tokenizer_keys(source.folder, config)
    keys.setdefault("general.name", _name(source))
    if file_type is not None:
        keys["general.file_type"] = file_type
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys | _provenance(source, recipe, imatrix)


def _without(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if k != name}


def _name(source: Checkpoint) -> str:
    """The name of the model: that of its folder, or of its file."""
    place = Path(source.file.path)
    folder = source.folder
    if folder.is_dir() and (folder / "model_index.json").is_file():
        return folder.resolve().name
    if source.file.kind == "safetensors" and place.name.startswith(("diffusion_pytorch_model", "model.")):
        return place.resolve().parent.name
    return place.stem


def _provenance(source: Checkpoint, recipe: Recipe | None, imatrix: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "zimage.version": __version__,
        "zimage.source": Path(source.file.path).name,
        "zimage.source_bytes": source.file.size,
    }
    if recipe is not None:
        keys |= recipe_keys(recipe)
    return keys | ({"quantize.imatrix.file": Path(imatrix).name} if imatrix else {})


def recipe_keys(recipe: Recipe) -> dict[str, Any]:
    """Keys that hold the recipe, so that the file can be reproduced."""
    return {"zimage.recipe_name": recipe.name, "zimage.recipe": recipe.text()}


def _transformer_keys(config: TransformerConfig) -> dict[str, Any]:
    """Keys of fields that do not follow from shapes and differ from those of the released models."""
    usual = {field.name: field.default for field in fields(TransformerConfig)}
    found: dict[str, Any] = {}
    for name in _TOLD:
        value = getattr(config, name)
        if value != usual[name]:
            found[f"zimage.{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def _text_keys(c: TextEncoderConfig, stated: Mapping[str, Any] | None) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": c.num_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_theta,
    }
    longest = (stated or {}).get("max_position_embeddings")
    if isinstance(longest, int) and 0 < longest < 1 << 32:
        keys["context_length"] = longest
    return {f"{c.arch}.{name}": value for name, value in keys.items()}


def _tokenizer_keys(folder: Path, config: TextEncoderConfig) -> dict[str, Any]:
    """llama.cpp's keys of the vocabulary beside a Hugging Face text encoder; empty if there is none."""
    for place in (folder, folder.parent / "tokenizer"):
        try:
            vocabulary = read_folder(place)
        except BadFile as error:
            if "no tokenizer in this folder" in str(error):
                continue
            raise
        return vocabulary_keys(vocabulary, config.vocab_size) | _template(Path(vocabulary.path).parent)
    return {}


def vocabulary_keys(vocabulary: Vocabulary, rows: int) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` of a byte-level BPE, padded to the rows of the embedding.

    Raises:
        BadFile: The vocabulary is inconsistent, or has more tokens than the embedding has rows.
        Unsupported: A GGUF cannot name its pre-tokenizer.
    """
    ids = vocabulary.checked()
    if max(ids.values()) >= rows:
        raise BadFile(
            vocabulary.path, f"{max(ids.values()) + 1} tokens, the text encoder has {rows} embeddings"
        )
    if vocabulary.pre not in PRE_TOKENIZERS.values():
        raise Unsupported(
            f"{printable(vocabulary.path)}: tokenizer.ggml.pre has no name for how this tokenizer cuts "
            "and composes words; keep the text encoder as safetensors, with its tokenizer"
        )
    texts, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, number in ids.items():
        texts[number] = text
        types[number] = _token_type(text, text in vocabulary.added)
    names = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[vocabulary.pre],
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": TypedArray(types, "i32"),
        "tokenizer.ggml.merges": TypedArray((f"{a} {b}" for a, b in vocabulary.merges), "string"),
    }
    # the roles of Qwen's tokens, which tokenizer.json does not have
    for role, text in (("bos", "<|endoftext|>"), ("eos", "<|im_end|>"), ("padding", "<|endoftext|>")):
        if text in ids:
            keys[f"tokenizer.ggml.{role}_token_id"] = ids[text]
    return keys | {"tokenizer.ggml.add_bos_token": False}


def _token_type(text: str, added: bool) -> int:
    if not added:
        return NORMAL
    return CONTROL if text.startswith("<|") else USER_DEFINED


def _template(folder: Path) -> dict[str, Any]:
    """The chat template as text for other programs; this library never evaluates it."""
    from zimage_core.files.untrusted import read_json

    try:
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
    except ZImageError:
        return {}
    fits = isinstance(template, str) and len(template) <= _MAX_TEMPLATE
    return {"tokenizer.chat_template": template} if fits else {}
