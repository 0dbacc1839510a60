"""Metadata of written files: the network, its origin and its vocabulary.

Names are llama.cpp's (gguf-py/gguf/constants.py), except `zimage.*`, which other readers ignore. In a
safetensors file every value is text: JSON where it is no text of itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from zimage_core import __version__
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig, VisionConfig
from zimage_core.errors import Unsupported, printable
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.export.recipes import Recipe
from zimage_core.export.vocabularies import folder_keys, tokenizer_folder
from zimage_core.weights.cursor import MAX_KEY
from zimage_core.weights.facts import PREFIX
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.gguf_writer import QUANTIZATION_VERSION, TypedArray, raw_keys

TRANSFORMER_ARCH = "lumina2"
"""Architecture of every published Z-Image GGUF; ComfyUI-GGUF accepts no other name."""
VISION_ARCH = "clip"
"""Architecture of every GGUF of a vision encoder (an mmproj of llama.cpp)."""

_TOLD: dict[type, tuple[str, ...]] = {
    TransformerConfig: ("axes_dims", "axes_lens", "rope_theta", "norm_eps", "t_scale"),
    AutoencoderConfig: ("norm_num_groups", "scaling_factor", "shift_factor"),
}
"""Fields of a config that do not follow from shapes; weights/infer.py reads them as `zimage.*`."""
_REPLACED = (
    "general.file_type", "general.quantization_version", "general.alignment", "quantize.", "split.",
    "comfy.gguf.orig_shape.", "zimage.version", "zimage.source",
)  # fmt: skip
"""Prefixes of a source's keys that are written anew or do not apply to the new file."""
_OF_GGUF = ("general.architecture", "tokenizer.", "zimage.float_type", "zimage.recipe")
"""Prefixes of keys that say something of a GGUF alone."""
_OF_SAFETENSORS = (
    "format", "quantization", "_quantization", "modelspec.hash", "modelspec.quant", "sshs_", "total_size",
)  # fmt: skip
"""Prefixes of keys that describe the bytes of a safetensors file, or are read by its readers alone."""
_MAX_ITEMS = 1000
"""Longest array that is carried from a GGUF to safetensors."""
Log = Callable[[str], None]


def gguf_metadata(
    source: Checkpoint,
    recipe: Recipe | None = None,
    imatrix: str = "",
    file_type: int | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """All keys for a GGUF made from `source`, in order.

    Args:
        source: The checkpoint. The keys of a GGUF text encoder are kept, including its tokenizer.
        recipe: The recipe of the types; None if the source's types were kept.
        imatrix: Name of the importance matrix; "" for none.
        file_type: llama.cpp's number for the mix; None if it has none.
        log: Called with a message if a text encoder gets no tokenizer.

    Raises:
        BadFile: The tokenizer beside the source is damaged.
    """
    config, is_gguf = source.config, isinstance(source.file, GGUFFile)
    if isinstance(source.file, GGUFFile):
        keys = {k: v for k, v in raw_keys(source.file).items() if not k.startswith(_REPLACED)}
    else:
        keys = {k: _typed(k, v) for k, v in _foreign(source).items() if 0 < len(k.encode()) <= MAX_KEY}
    if isinstance(config, TransformerConfig):
        keys = {"general.architecture": TRANSFORMER_ARCH, **_without(keys, "general.architecture")}
        keys |= _told_keys(config) | _fact_keys(source.facts)
    elif isinstance(config, TextEncoderConfig) and not (is_gguf and "general.architecture" in keys):
        keys = {"general.architecture": config.arch, **keys, **_text_keys(source, config)}
        if not any(key.startswith("tokenizer.") for key in keys):
            keys |= _tokenizer_keys(source, config, log)
    elif isinstance(config, VisionConfig):
        keys = {"general.architecture": VISION_ARCH, **keys, **_vision_keys(config)}
    keys.setdefault("general.name", _name(source))
    if file_type is not None:
        keys["general.file_type"] = file_type
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys | _provenance(source, recipe, imatrix)


def safetensors_metadata(source: Checkpoint, facts: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The metadata of a safetensors file made from `source`, as texts; `facts` replace the source's own."""
    config = source.config
    keys = {k: v for k, v in _foreign(source).items() if not k.startswith(_OF_GGUF)}
    if isinstance(config, TextEncoderConfig):
        keys |= _text_keys(source, config)
    elif isinstance(config, VisionConfig):
        keys |= _vision_keys(config)
    else:
        keys |= _told_keys(config)
    known = source.facts if facts is None else facts
    keys |= _fact_keys(known) | _provenance(source, None, "")
    texts = {key: _text(value) for key, value in keys.items()}
    return {"format": "pt"} | {key: text for key, text in texts.items() if text is not None}


def _foreign(source: Checkpoint) -> dict[str, Any]:
    """The source's own keys, without those that describe its bytes, its sizes or its tokenizer."""
    drop = (*_REPLACED, *(() if isinstance(source.file, GGUFFile) else _OF_SAFETENSORS))
    if isinstance(source.config, TextEncoderConfig):
        drop += (f"{source.config.arch}.",)
    return {k: v for k, v in source.file.metadata.items() if not k.startswith(drop)}


def _typed(key: str, text: str) -> Any:
    """The value for a GGUF of a key of a safetensors file, all of whose values are texts."""
    if key.startswith(("general.", PREFIX)) and (text[:1] == "[" or key.endswith(".count")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, list) and value and len({type(item) for item in value}) == 1:
            return TypedArray(value, "string") if isinstance(value[0], str) else value
        return value if type(value) is int and 0 <= value < 1 << 32 else text
    return text


def _text(value: Any) -> str | None:
    """A value as text, as `json.loads` or this text itself gives it back; None for a long array."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.7g}"  # a GGUF holds float32, which has no more digits
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    items = list(value) if len(value) <= _MAX_ITEMS else [value]
    return json.dumps(items) if all(isinstance(item, (str, bool, int, float)) for item in items) else None


def _without(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if k != name}


def _name(source: Checkpoint) -> str:
    """The name of the model: what its file says, else that of its folder or its file."""
    stated = source.file.metadata.get("modelspec.title")
    if isinstance(stated, str) and stated:
        return stated
    place = Path(source.file.path)
    folder = source.folder
    if folder.is_dir() and (folder / "model_index.json").is_file():
        return folder.resolve().name
    if source.file.kind == "safetensors" and place.name.startswith(("diffusion_pytorch_model", "model.")):
        return place.resolve().parent.name
    return place.stem


def _provenance(source: Checkpoint, recipe: Recipe | None, imatrix: str) -> dict[str, Any]:
    identity = source.file.identity()
    keys: dict[str, Any] = {
        "zimage.version": __version__,
        "zimage.source": Path(source.file.path).name,
        "zimage.source_bytes": source.file.size,
    }
    keys |= {f"zimage.source_{k}": v for k, v in identity.items() if k in ("sha256", "fingerprint")}
    if recipe is not None:
        keys |= recipe_keys(recipe)
    return keys | ({"quantize.imatrix.file": Path(imatrix).name} if imatrix else {})


def recipe_keys(recipe: Recipe) -> dict[str, Any]:
    """Keys that hold the recipe, so that the file can be reproduced."""
    return {"zimage.recipe_name": recipe.name, "zimage.recipe": recipe.text()}


def _fact_keys(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the image size and the schedule."""
    return {
        PREFIX + name: json.dumps(value) if isinstance(value, Mapping) else value
        for name, value in facts.items()
    }


def _told_keys(config: TransformerConfig | AutoencoderConfig) -> dict[str, Any]:
    """Keys of fields that do not follow from shapes and differ from those of the released models."""
    usual = {field.name: field.default for field in fields(config)}
    found: dict[str, Any] = {}
    for name in _TOLD[type(config)]:
        value = getattr(config, name)
        if value != usual[name]:
            found[PREFIX + name] = list(value) if isinstance(value, tuple) else value
    return found


def _text_keys(source: Checkpoint, c: TextEncoderConfig) -> dict[str, Any]:
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
    if (longest := context_length(source)) is not None:
        keys["context_length"] = longest
    return {f"{c.arch}.{name}": value for name, value in keys.items()}


def _vision_keys(c: VisionConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": c.num_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.layer_norm_epsilon": c.layer_norm_eps,
        "patch_size": c.patch_size,
    }
    return {f"clip.vision.{name}": value for name, value in keys.items()}


def context_length(source: Checkpoint) -> int | None:
    """The longest text of a language model in tokens, as its file or config.json states it."""
    key = f"{source.config.arch}.context_length"
    found = (source.stated or {}).get("max_position_embeddings", source.file.metadata.get(key))
    if isinstance(found, str) and found.isdecimal() and len(found) < 12:
        found = int(found)
    return found if type(found) is int and 0 < found < 1 << 32 else None


def _tokenizer_keys(source: Checkpoint, config: TextEncoderConfig, log: Log | None) -> dict[str, Any]:
    """llama.cpp's keys of the vocabulary beside a Hugging Face text encoder; empty if there is none."""
    folder = tokenizer_folder(source.folder) or tokenizer_folder(Path(source.file.path).parent)
    remark = f"there is no tokenizer beside {printable(source.file.path)}"
    try:
        if folder is not None:
            return folder_keys(folder, config.vocab_size)
    except Unsupported as error:
        remark = str(error)
    if log is not None:
        log(f"the output has no tokenizer, so give one beside it (--tokenizer): {remark}")
    return {}
