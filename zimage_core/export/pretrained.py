"""`save_pretrained` of networks and pipelines: the folder that diffusers writes, with the present weights."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from zimage_core.config import COMPONENTS, OPTIONAL_COMPONENTS
from zimage_core.errors import BadFile, Unsupported, printable
from zimage_core.export.configs import CLASSES
from zimage_core.export.folders import SHARD_BYTES
from zimage_core.export.saving import save_network, save_scheduler, save_tokenizer
from zimage_core.files.atomic import write_atomically
from zimage_core.files.units import parse_bytes
from zimage_core.text.prompt import CHAT_TEMPLATE
from zimage_core.vision.processor import CONFIG as PROCESSOR_CONFIG
from zimage_core.vision.processor import FOLDER as PROCESSOR
from zimage_core.vision.processor import processor_of
from zimage_core.weights.load import opened_file

INDEX = "model_index.json"
_FROM = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "ZImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "siglip": ("transformers", "Siglip2VisionModel"),
}
"""Component -> package and class in model_index.json; a text encoder's class depends on its kind."""


def save_pretrained(
    what: Any,
    folder: str | PathLike[str],
    *,
    dequantize: str | None = None,
    max_shard_size: int | str = SHARD_BYTES,
    variant: str | None = None,
    overwrite: bool = False,
    **others: Any,
) -> None:
    """Write a pipeline as a folder that this library and diffusers load, or a network as a component of one.

    Weights are written as they are in memory, edits included, each in its own dtype.

    Args:
        what: A pipeline, a transformer, a text encoder or a VAE.
        folder: New or empty; with `variant` or `overwrite` also one that holds other files, which stay.
        dequantize: "bf16", "f16" or "f32": the type of floats that packed weights become.
        max_shard_size: Most bytes of one file, as a number or as "5GB".
        variant: The word in the names of the files of weights, such as "fp16".
        overwrite: Replace files of the same names; what was loaded from them may be saved over them.
        others: Further arguments of diffusers; only those that ask for what is done anyway are taken.

    Raises:
        BadArgument: `what` is something else, its blocks are streamed, or an argument is wrong.
        BadFile: The folder cannot be written, or holds files that may not be replaced.
        Unsupported: Weights are packed and `dequantize` is missing; a layer was replaced by another kind of
            module; or an argument of diffusers is not supported.
    """
    usual = {"safe_serialization": True, "is_main_process": True, "push_to_hub": False, "save_function": None}
    for name, value in others.items():
        if name not in usual or value != usual[name]:
            shown = printable(repr(value), 60)
            raise Unsupported(f"save_pretrained: {name}={shown} is not supported; leave it out")
    options: dict[str, Any] = {
        "dequantize": dequantize,
        "max_shard_bytes": parse_bytes("max_shard_size", max_shard_size),
        "variant": variant,
        "overwrite": overwrite,
    }
    what = getattr(what, "_orig_mod", what)  # compiled
    _refuse_adapters(what)
    if isinstance(what, nn.Module) or not hasattr(what, "components"):
        save_network(what, folder, **options)
    else:
        _save_pipeline(what, Path(folder), options)


def _refuse_adapters(what: Any) -> None:
    """Refuse networks whose adapters are beside their weights, so that a saved one would lack them.

    Raises:
        Unsupported: The message names an adapter.
    """
    parts = [what] if isinstance(what, nn.Module) else list(getattr(what, "components", {}).values())
    for part in parts:
        adapted = getattr(part, "adapted", None)
        state = None if adapted is None else adapted.state
        beside = [] if state is None else sorted(state.weights.keys() - state.fused)
        if beside and state is not None and state.enabled:
            raise Unsupported(
                f"save_pretrained: {printable(beside[0], 80)!r} is an adapter beside the weights and would "
                "be lost; call fuse_lora(dequantize=True) first, or unload_lora()"
            )


def _save_pipeline(pipe: Any, folder: Path, options: Mapping[str, Any]) -> None:
    """Write each component into its folder, and model_index.json last."""
    join = options["overwrite"] or options["variant"] is not None
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not join)):
        raise BadFile(folder, "exists already", "choose another folder or allow overwriting (overwrite=True)")
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0"}
    if (tower := getattr(pipe, "siglip", None)) is not None:
        index |= {"_class_name": "ZImageOmniPipeline", PROCESSOR: ["transformers", "Siglip2ImageProcessor"]}
        (folder / PROCESSOR).mkdir(exist_ok=True)
        settings = json.dumps(processor_of(tower).to_json(), indent=2) + "\n"
        write_atomically(folder / PROCESSOR / PROCESSOR_CONFIG, settings.encode(), overwrite=join)
    facts = {"sample_size": pipe.sample_size, "shift": float(pipe.scheduler.shift)}
    for name, component in sorted(pipe.components.items()):
        index[name] = [None, None] if component is None else list(_class_of(name, component))
        if component is None:
            continue
        if name in (*COMPONENTS, *OPTIONAL_COMPONENTS):
            save_network(component, folder / name, facts=facts, **options)
        elif name == "scheduler":
            save_scheduler(component, folder / name, overwrite=join)
        else:
            part = None if pipe.text_encoder is None else opened_file(pipe.text_encoder)
            usual = {"tokenizer.chat_template": CHAT_TEMPLATE}  # without one, diffusers encodes no prompt
            metadata = usual if part is None else ChainMap(dict(part.file.metadata), usual)
            save_tokenizer(component, folder / name, metadata=metadata, overwrite=join)
    write_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode(), overwrite=join)


def _class_of(name: str, component: Any) -> tuple[str, str]:
    return ("transformers", CLASSES[component.config.arch]) if name == "text_encoder" else _FROM[name]
