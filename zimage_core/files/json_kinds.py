"""Names the JSON files that lie in model folders or that this library writes, by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zimage_core.errors import printable

TOKENIZER = "a tokenizer_config.json"
VOCABULARY = "a vocab.json"


def name_of(data: Mapping[str, Any]) -> str:
    """Noun phrase that says what a JSON object is, or "" if it is none of the known ones."""
    kind, name = data.get("kind"), data.get("_class_name")
    if isinstance(kind, str) and kind.startswith("zimage_core sensitivity"):
        return "costs of types, measured by `zimage sensitivity`"
    if {"labels", "psnr", "ssim"} <= data.keys():
        return "a comparison of two models by `zimage compare`"
    if "weight_map" in data:
        return "an index of shards"
    if "added_tokens_decoder" in data or "tokenizer_class" in data:
        return TOKENIZER
    if isinstance(name, str):
        shown = f" (class {printable(name, 60)})"
        if name.endswith("Pipeline"):
            return f"the list of the parts of a pipeline, a model_index.json{shown}"
        return f"the config of a {'scheduler' if 'Scheduler' in name else 'model'}{shown}"
    if "model_type" in data or "architectures" in data:
        shown = f" (type {printable(data['model_type'], 60)})" if "model_type" in data else ""
        return f"the config of a model{shown}"
    for keys, title in _BY_KEYS:
        if keys <= data.keys():
            return title
    if data and all(isinstance(value, dict) and "class_type" in value for value in data.values()):
        return "a workflow of ComfyUI"
    if data and all(type(value) is int for value in data.values()):
        return VOCABULARY
    return ""


_BY_KEYS = (
    ({"nodes", "links"}, "a workflow of ComfyUI"),
    ({"eos_token_id", "transformers_version"}, "a generation_config.json"),
    ({"image_processor_type"}, "a preprocessor_config.json"),
    ({"eos_token", "pad_token"}, "a special_tokens_map.json"),
    ({"error"}, "an error message that a download saved"),
    ({"message", "documentation_url"}, "an error message that a download saved"),
    ({"container", "kind", "title"}, "a report of `zimage inspect`"),
)
