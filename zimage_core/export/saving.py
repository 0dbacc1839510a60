"""Writes what a pipeline has in memory: networks with their present weights, scheduler and tokenizer.

Files are those of a diffusers folder. What a network's file knows and the network does not use (the last
layer of a text encoder, its provenance) is copied from that file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig, VisionConfig
from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.export.checkpoint import PREFIXES, SLAB, Checkpoint, Part, Target, table_of
from zimage_core.export.configs import new_config
from zimage_core.export.folders import SHARD_BYTES, write_component
from zimage_core.export.metadata import safetensors_metadata
from zimage_core.export.streaming import Job, Progress
from zimage_core.export.vocabularies import tokenizer_files
from zimage_core.files.atomic import atomic_folder, write_atomically
from zimage_core.formats import DTYPE_NAMES, FORMATS, BlockFormat
from zimage_core.memory.stream import Stream
from zimage_core.quant.tensor import QuantTensor
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.load import opened_file

FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""Value of `dequantize` -> type that packed weights are dequantised to."""
_COMPONENTS = {
    TransformerConfig: "transformer", TextEncoderConfig: "text_encoder", AutoencoderConfig: "vae",
    VisionConfig: "siglip",
}  # fmt: skip
_LAYOUTS = {"transformer": "split", "text_encoder": "hf", "vae": "diffusers", "siglip": "hf"}
_FORMATS = {f"torch.{dtype}": FORMATS[name] for name, dtype in DTYPE_NAMES.items()}


class HasShift(Protocol):
    """The part of a scheduler that is written."""

    @property
    def shift(self) -> float:
        """The shift of the noise levels."""


def save_network(
    network: nn.Module,
    folder: str | PathLike[str],
    *,
    dequantize: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    variant: str | None = None,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a network as a diffusers component: shards and config.json, with the weights of this moment.

    Args:
        network: A transformer, text encoder, VAE or vision tower, on any device.
        folder: New or empty; with `variant` or `overwrite` also one that holds other files, which stay.
        dequantize: "bf16", "f16" or "f32": the type of floats that packed weights become.
        max_shard_bytes: Most bytes of one file; a larger tensor gets a file of its own.
        variant: The word in the names of the files, such as "fp16": diffusion_pytorch_model.fp16.safetensors.
        overwrite: Replace the files of the same variant; a network that was loaded from them may be saved.
        facts: What is written about image size and schedule instead of what the network's file states:
            "sample_size" in pixels, "shift" of the noise levels.
        progress: Called as progress(weights done, weights in all, tensor).

    Returns:
        The size of the files of weights in bytes.

    Raises:
        BadArgument: The network is no part of Z-Image or is streamed, or an argument is wrong.
        BadFile: The folder cannot be written, or holds files that may not be replaced.
        Unsupported: Weights are packed and `dequantize` is missing, or have a dtype that is not written.
        BadWeights: Numbers are beyond the range of the wanted type.
    """
    config: Any = getattr(network, "config", None)
    component = _COMPONENTS.get(type(config))
    if component is None:
        kind = printable(type(network).__name__, 60)
        raise BadArgument(f"network: got {kind}, wanted a network of this library")
    if dequantize is not None and dequantize not in FLOATS:
        raise BadArgument(f"dequantize: got {printable(dequantize, 40)!r}, wanted one of {', '.join(FLOATS)}")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise BadArgument(f"max_shard_bytes: got {printable(max_shard_bytes, 40)}, wanted 1 or more")
    if isinstance(getattr(network, "stream", None), Stream):
        raise BadArgument("network: its blocks are streamed under a memory budget; lift the budget first")
    opened = opened_file(network)
    prefix = PREFIXES.get(component, "")
    source = _Memory(network, component, None if opened is None else Checkpoint(opened, component), prefix)
    jobs = [Job(target, source.wanted(target, dequantize)) for target in source.targets]
    file = source.checkpoint
    stated = None if file is None else file.stated
    if stated is not None:
        stated = {key: value for key, value in stated.items() if key != "quantization_config"}
    known = (
        {**(file.facts if file is not None else {}), **(facts or {})} if component == "transformer" else {}
    )
    metadata = {"format": "pt"} if file is None else safetensors_metadata(file, known)
    written = new_config(config, jobs, stated, known)
    return write_component(
        source,
        jobs,
        component,
        written,
        metadata,
        folder,
        shard_bytes=max_shard_bytes,
        variant=variant,
        overwrite=overwrite,
        progress=progress,
    )


class _Memory:
    """The tensors of a network in memory, and those that only its file has.

    Args:
        network: The network.
        component: Which one it is.
        checkpoint: The open file that it came from, or None.
        prefix: Text before the names of its tensors.
    """

    def __init__(
        self, network: nn.Module, component: str, checkpoint: Checkpoint | None, prefix: str
    ) -> None:
        self.network, self.checkpoint = network, checkpoint
        self.path = "the network" if checkpoint is None else checkpoint.path
        modules = dict(network.named_modules())
        self._weights: dict[str, Tensor | QuantTensor] = {}
        self.targets: list[Target] = []
        never: tuple[str, ...] = ()  # parts that are not built, which come from the file
        if isinstance(config := network.config, TextEncoderConfig):
            never = (f"layers.{config.num_layers - 1}.",)
        own: set[str] = set()
        rows = {e.checkpoint: e for e in table_of(component, network.config, _LAYOUTS[component])}
        for name, entry in rows.items():
            owner, _, leaf = entry.module.rpartition(".")
            if entry.module.startswith(never):
                continue
            own.add(entry.module)
            if owner not in modules or not hasattr(modules[owner], leaf):
                raise _changed(entry.module)
            self._weights[prefix + name] = getattr(modules[owner], leaf)
            self.targets.append(Target(prefix + name, entry.shape, (Part(prefix + name),)))
        for name, _ in network.named_parameters():
            if name not in own:
                raise _changed(name)
        if checkpoint is not None:
            stored = checkpoint.targets(_LAYOUTS[component], prefix)
            self.targets += [target for target in stored if target.name not in self._weights]

    def wanted(self, target: Target, dequantize: str | None) -> BlockFormat:
        """The type in which a tensor is written."""
        stored = self.format_of(target)
        if stored is not None and stored.is_float and not self.is_scaled(target):
            return stored
        if dequantize is None:
            found = "a type that safetensors lacks" if stored is None else stored.name
            raise Unsupported(
                f"{printable(target.name, 120)} is packed as {found}, which a diffusers folder cannot hold; "
                'give dequantize="bf16" (or "f16", "f32"), or keep its GGUF'
            )
        return FORMATS[FLOATS[dequantize]]

    def format_of(self, target: Target) -> BlockFormat | None:
        weight = self._weights.get(target.name)
        if isinstance(weight, QuantTensor):
            return weight.format
        if weight is not None:
            fmt = _FORMATS.get(str(weight.dtype))
            if fmt is None or tuple(weight.shape) != target.shape:
                raise Unsupported(
                    f"{printable(target.name, 120)} is {weight.dtype} of shape {tuple(weight.shape)}; wanted "
                    f"float32, float16 or bfloat16 of shape {target.shape}"
                )
            return fmt
        return None if self.checkpoint is None else self.checkpoint.format_of(target)

    def is_scaled(self, target: Target) -> bool:
        weight = self._weights.get(target.name)
        if weight is not None:
            return isinstance(weight, QuantTensor) and weight.scale is not None
        return self.checkpoint is not None and self.checkpoint.is_scaled(target)

    def raw(self, target: Target) -> Iterator[bytearray | memoryview]:
        weight = self._weights.get(target.name)
        if weight is None:
            if self.checkpoint is not None:
                yield from self.checkpoint.raw(target)
            return
        data = weight.packed if isinstance(weight, QuantTensor) else weight.detach()
        yield data.cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    def dense(self, target: Target) -> Iterator[Tensor]:
        weight = self._weights.get(target.name)
        if weight is None:
            if self.checkpoint is not None:
                yield from self.checkpoint.dense(target)
            return
        if not isinstance(weight, QuantTensor):
            yield weight.detach().float().cpu().reshape(-1, target.columns)
            return
        step = max(1, SLAB * target.shape[0] // max(1, target.weights)) if target.shape else 1
        for start in range(0, target.shape[0] if target.shape else 1, step):
            part = weight.rows(start, min(start + step, target.shape[0])) if target.shape else weight
            yield part.dequantize(torch.float32).cpu().reshape(-1, target.columns)

    def check_unchanged(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.check_unchanged()


def _changed(name: str) -> Unsupported:
    return Unsupported(
        f"{printable(name, 120)}: this layer was replaced or removed, and a checkpoint has no place for it; "
        "put a layer of the network's own kind there, with its merged weight"
    )


def save_scheduler(scheduler: HasShift, folder: str | PathLike[str], overwrite: bool = False) -> None:
    """Write scheduler_config.json as diffusers reads it, in a folder that is made if it does not exist.

    Raises:
        BadFile: The file exists and may not be replaced, or cannot be written.
    """
    fields = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": float(scheduler.shift),
        "use_dynamic_shifting": False,
    }
    content = (json.dumps(fields, indent=2) + "\n").encode()
    _write_files({"scheduler_config.json": content}, folder, overwrite)


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: str | PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them.

    Args:
        tokenizer: The tokenizer.
        folder: Made if it does not exist.
        metadata: Keys of the GGUF that it came from (`text_encoder.opened.file.metadata`): roles of tokens,
            flags and the chat template.
        overwrite: Replace files that exist.

    Raises:
        BadFile: A file exists and may not be replaced, or cannot be written.
        Unsupported: The vocabulary is SentencePiece's, which has no tokenizer.json.
    """
    _write_files(tokenizer_files(tokenizer, metadata), folder, overwrite)


def _write_files(files: Mapping[str, bytes], folder: str | PathLike[str], overwrite: bool) -> None:
    with atomic_folder(folder, join=overwrite) as new:
        for name, content in files.items():
            write_atomically(Path(new) / name, content)
