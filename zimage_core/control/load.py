"""Loads a ControlNet from a GGUF or safetensors file, by the machinery that loads the other networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zimage_core.assets import embedded_part
from zimage_core.control.config import ControlConfig, control_config
from zimage_core.control.model import ControlNet
from zimage_core.errors import BadArgument, BadFile, BadWeights, WrongModel, printable
from zimage_core.files.untrusted import read_json
from zimage_core.nn.compute import set_compute
from zimage_core.quant.arithmetic import MODES
from zimage_core.weights import infer, names, storage
from zimage_core.weights.components import open_component
from zimage_core.weights.controlnets import EMBEDDER, LAYERS, REFINER, SHARED, repeats
from zimage_core.weights.load import DTYPES, assembled
from zimage_core.weights.opened import Opened
from zimage_core.weights.source import path_text

if TYPE_CHECKING:
    from zimage_core.config import TransformerConfig
    from zimage_core.weights.card import ModelCard

WANTED = "a Z-Image ControlNet"
ADVICE = "get one that was made for Z-Image, such as Z-Image-Turbo-Fun-Controlnet-Union-2.1"
OTHERS = {
    "controlnet_blocks.0.": "a ControlNet of FLUX.1, Qwen-Image or Stable Diffusion 3",
    "controlnet_down_blocks.0.": "a ControlNet of Stable Diffusion",
    "input_hint_block.0.": "a ControlNet of Stable Diffusion",
    "controlnet_cond_embedding.": "a ControlNet of Stable Diffusion",
    "input_hint_blocks.0.": "a ControlNet of FLUX.1 by XLabs",
    "controlnet_patch_embed.": "a ControlNet of another model",
}
"""Piece of a tensor's name -> what the file is."""


def load_controlnet(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
    compute: str = "exact",
) -> ControlNet:
    """Load a ControlNet of Z-Image.

    Args:
        path: A GGUF or safetensors file, an index of shards, the folder of one, or "edges" for the one of the
            embedded model.
        dtype: The dtype of the computation: float32, float16 or bfloat16. Packed weights keep their own type.
            A pipeline that uses it casts it to its transformer's.
        device: Device of the model.
        mmap: Use the weights in place; the file must not change meanwhile. False reads it into memory.
        compute: In which numbers the blocks multiply, as for `load_transformer`.

    Raises:
        BadFile, UnknownFormat: The file cannot be opened.
        WrongModel: It holds another model; the message says what it is and what to get.
        BadWeights: Tensors are missing, unexpected or misshapen (all of them are listed), or hold NaN
            or infinity in norms or biases.
    """
    if dtype not in DTYPES:
        raise BadArgument(f"dtype is {dtype}, wanted one of {', '.join(str(d) for d in DTYPES)}")
    if compute not in MODES:
        raise BadArgument(f"compute is {printable(compute, 40)}; it must be one of {', '.join(MODES)}")
    opened = open_component(located(path), "", mmap)
    try:
        opened, config, table = checked(opened)
        for caution in opened.card.cautions:
            warnings.warn(f"{printable(opened.file.path)}: {caution}", UserWarning, stacklevel=2)
        net = assembled(partial(ControlNet, config), opened, table, dtype, device)
        if compute != "exact":
            set_compute(net, compute, torch.device(device))
        return net
    except BaseException:
        opened.file.close()
        raise


def located(path: str | PathLike[str]) -> str | PathLike[str]:
    """The path, or the file of the embedded model's ControlNet for its name."""
    return embedded_part(path_text(path)) or path


def checked(opened: Opened) -> tuple[Opened, ControlConfig, names.Table]:
    """Refuse a file that is no sound ControlNet of Z-Image; else its config and the table of its tensors.

    Raises:
        WrongModel: It holds another model, or weights that cannot be read.
        BadWeights: Tensors are missing, unexpected or misshapen.
    """
    file, card = opened.file, opened.card
    if card.kind != "controlnet":
        title = next((title for mark, title in OTHERS.items() if any(mark in n for n in file.tensors)), "")
        raise WrongModel(file.path, f"this is {title or card.title}, where {WANTED} is wanted", ADVICE)
    if problem := storage.storage_problem(file, card.prefix):
        raise WrongModel(file.path, f"this is {card.title}: {problem}")
    shapes = {
        n[len(card.prefix) :]: info.shape for n, info in file.tensors.items() if n.startswith(card.prefix)
    }
    try:
        metadata = {**_stated(file.path), **infer.values(file.metadata)}
        config = control_config(shapes, metadata, lambda name: repeats(file, card.prefix + name))
    except BadWeights as error:
        raise BadWeights(f"{printable(file.path)}: this is {card.title}: {error}; {ADVICE}") from None
    table = control_table(config, card.layout)
    card = _compared(card, config, table, shapes)
    if faults := card.faults():
        raise BadWeights(
            f"{printable(file.path)}: this is {card.title} with tensors that do not fit: {faults}; {ADVICE}"
        )
    return replace(opened, card=card), config, table


def _stated(path: str) -> dict[str, Any]:
    """The places in a config.json of diffusers' ZImageControlNetModel beside the file, if there is one."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        found = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    except BadFile:
        found = {}  # it may belong to another model
    places = found.get("control_layers_places")
    ours = found.get("_class_name") == "ZImageControlNetModel" and places is not None
    return {"places": places} if ours else {}


def control_table(config: ControlConfig, layout: str) -> names.Table:
    """Table of a ControlNet: blocks are named in files as those of the S3-DiT are in the same layout."""
    return tuple(_entries(config, config.blocks, layout))


def _entries(config: ControlConfig, blocks: TransformerConfig, layout: str) -> Iterator[names.Entry]:
    d = config.dim
    yield names.Entry(f"{EMBEDDER}.weight", f"{EMBEDDER}.weight", (d, blocks.patch_dim))
    yield names.Entry(f"{EMBEDDER}.bias", f"{EMBEDDER}.bias", (d,))
    renamed = {"layers": LAYERS, "noise_refiner": REFINER}
    for entry in names.transformer_table(blocks, layout):
        stack, _, rest = entry.module.partition(".")
        if stack in renamed:
            stored = f"{renamed[stack]}.{entry.checkpoint.partition('.')[2]}"
            yield replace(entry, module=f"{renamed[stack]}.{rest}", checkpoint=stored)
    projecting = {LAYERS: config.n_layers}
    if config.steers_refiner:
        projecting[REFINER] = config.n_refiner_layers
    for stack, count in projecting.items():
        for i in range(count):
            for part in ("before_proj", "after_proj") if i == 0 else ("after_proj",):
                name = f"{stack}.{i}.{part}"
                yield names.Entry(f"{name}.weight", f"{name}.weight", (d, d))
                yield names.Entry(f"{name}.bias", f"{name}.bias", (d,))


def _compared(
    card: ModelCard, config: ControlConfig, table: names.Table, shapes: dict[str, infer.Shape]
) -> ModelCard:
    """The card, completed with the tensors that do not fit the table."""
    wanted = names.checkpoint_shapes(table)
    unused = f"{REFINER}." if config.refiner == SHARED else "\0"  # 2.0 may hold a refiner that nobody trained
    return replace(
        card,
        missing=tuple(name for name in wanted if name not in shapes),
        unexpected=tuple(
            name
            for name in shapes
            if name not in wanted and not name.startswith(unused) and not storage.is_companion(name, shapes)
        ),
        misshapen=tuple(
            f"{name} is {shapes[name]}, wanted {shape}"
            for name, shape in wanted.items()
            if name in shapes and infer.squeezed(shapes[name]) != infer.squeezed(shape)
        ),
    )
