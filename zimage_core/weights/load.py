"""Build a network from a file: on the meta device, then assign; nothing is initialised or copied twice.

Weights of Linear and Embedding stay packed, as views of the file, unless they are stored in the dtype of
the computation already; norms, biases, pad tokens and convolutions become dense tensors of that dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, BadWeights, printable
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights import names, storage
from zimage_core.weights.card import ModelCard, check_compatible, require
from zimage_core.weights.files import open_weights
from zimage_core.weights.folders import locate
from zimage_core.weights.identify import identify
from zimage_core.weights.source import WeightFile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Network = TypeVar("Network", ZImageTransformer, TextEncoder, Autoencoder)

_OPEN_FILES: WeakKeyDictionary[nn.Module, WeightFile] = WeakKeyDictionary()


class _Uninitialised(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device its random functions would import the compiler, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def weight_file(model: nn.Module) -> WeightFile | None:
    """The file whose bytes a loaded model uses in place; its check_unchanged() belongs before a run."""
    return _OPEN_FILES.get(getattr(model, "_orig_mod", model))  # of torch.compile: the model inside


def open_component(
    path: str | PathLike[str], component: str, mmap: bool = True
) -> tuple[WeightFile, ModelCard]:
    """Open the file of a component and identify it; headers only.

    Args:
        path: A GGUF or safetensors file, an index of shards, a component's folder, or a diffusers folder.
        component: "transformer", "text_encoder" or "vae".
        mmap: Hand out tensors as views of the file.

    Returns:
        The open file, and its card, which may be another model's; `require` refuses that.

    Raises:
        BadFile: The path holds no model file that can be opened.
    """
    place, stated, binding = locate(path, component)
    file = open_weights(place, mmap=mmap)
    card = identify(file, component, stated)
    if stated is not None and not binding and card.problem:
        # a config.json beside a single file may be any model's; the tensors have the last word
        alone = identify(file, component)
        if not alone.problem:
            card = replace(
                alone,
                cautions=(*alone.cautions, f"config.json beside the file was ignored: {card.problem}"),
            )
    return file, card


def check_files(paths: Mapping[str, str | PathLike[str]]) -> None:
    """Refuse files that do not make a pipeline together, by their headers, before a weight is read.

    Args:
        paths: "transformer", "text_encoder" and "vae" -> file or folder, as for the loaders; without a
            transformer each is looked at alone.

    Raises:
        BadFile, UnknownFormat, WrongModel, BadWeights: As the loaders do; WrongModel also where each file
            is sound and they do not fit each other.
    """
    cards, places = {}, {}
    for component, path in paths.items():
        file, card = open_component(path, component)
        with file:
            require(card, component, file.path)
            cards[component], places[component] = card, file.path
    configs = {component: card.config for component, card in cards.items()}
    if "transformer" in configs:
        check_compatible(**configs, paths=places)  # type: ignore[arg-type]  # `require` saw to their kinds


def load_transformer(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
) -> ZImageTransformer:
    """Load an S3-DiT.

    Args:
        path: See open_component.
        dtype: Of the computation: float32, float16 or bfloat16. Packed weights keep their own type.
        device: Where the model is put.
        mmap: Use the weights in place; the file must not change meanwhile. False reads it into memory.

    Raises:
        BadFile, UnknownFormat: The file cannot be opened.
        WrongModel: It holds another model; the message says what it is and what to get.
        BadWeights: Tensors are missing, unexpected or misshapen (all of them are listed), or hold NaN
            or infinity in norms, biases or pad tokens.
        Unsupported: Its weights are stored in a way that is not read.
    """

    def build(card: ModelCard) -> tuple[ZImageTransformer, names.Table]:
        if not isinstance(card.config, TransformerConfig):
            raise BadWeights(f"{printable(fspath(path))}: its size cannot be told")
        table = names.transformer_table(card.config, card.layout)
        # the vision branch of an Omni checkpoint has no part in text to image
        return ZImageTransformer(card.config), tuple(e for e in table if not e.module.startswith("siglip_"))

    return _load(path, "transformer", build, dtype, device, mmap)


def load_text_encoder(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
) -> TextEncoder:
    """Load a Qwen3, Qwen2 or llama text encoder without its last layer and final norm.

    See load_transformer.
    """

    def build(card: ModelCard) -> tuple[TextEncoder, names.Table]:
        if not isinstance(card.config, TextEncoderConfig):
            raise BadWeights(f"{printable(fspath(path))}: its size cannot be told")
        return TextEncoder(card.config), names.text_encoder_table(card.config, card.layout)

    return _load(path, "text_encoder", build, dtype, device, mmap)


def load_vae(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
) -> Autoencoder:
    """Load a Flux-style VAE. See load_transformer."""

    def build(card: ModelCard) -> tuple[Autoencoder, names.Table]:
        if not isinstance(card.config, AutoencoderConfig):
            raise BadWeights(f"{printable(fspath(path))}: its size cannot be told")
        return Autoencoder(card.config), names.autoencoder_table(card.config, card.layout)

    return _load(path, "vae", build, dtype, device, mmap)


def _load(
    path: str | PathLike[str],
    component: str,
    build: Callable[[ModelCard], tuple[Network, names.Table]],
    dtype: torch.dtype,
    device: str | torch.device,
    mmap: bool,
) -> Network:
    if dtype not in DTYPES:
        raise BadArgument(f"dtype is {dtype}, wanted one of {', '.join(str(d) for d in DTYPES)}")
    file, card = open_component(path, component, mmap)
    try:
        require(card, component, file.path)
        for caution in card.cautions:
            warnings.warn(f"{printable(file.path)}: {caution}", UserWarning, stacklevel=4)
        with torch.device("meta"), _Uninitialised():
            model, table = build(card)
        model.to(dtype)  # what a layer's dtype is decides which weights stay packed
        fill(model, file, table, card.prefix, dtype)
    except BaseException:
        file.close()
        raise
    model.requires_grad_(False).eval()
    _OPEN_FILES[model] = file
    return model.to(device)


def fill(model: nn.Module, file: WeightFile, table: names.Table, prefix: str, dtype: torch.dtype) -> None:
    """Assign every entry of the table from the file.

    Raises:
        BadWeights: A dense tensor holds NaN or infinity, or does not fit float16.
    """
    for name, entries in names.sources(table).items():
        whole = _shaped(storage.scaled_tensor(file, prefix + name), entries[0].stored_shape)
        for entry in entries:
            part = whole if entry.rows is None else whole.rows(*entry.rows)
            if entry.heads:
                part = _unpermuted(part, entry.heads)
            owner, _, leaf = entry.module.rpartition(".")
            module = model.get_submodule(owner)
            if leaf == "weight" and isinstance(module, (Linear, Embedding)):
                module.assign(part)
            else:
                dense = _dense(part, dtype, f"{printable(file.path)}: {printable(prefix + name, 120)}")
                setattr(module, leaf, nn.Parameter(dense, requires_grad=False))


def _shaped(tensor: QuantTensor, shape: tuple[int, ...]) -> QuantTensor:
    """The same numbers with axes of length 1 added or dropped: pad tokens, 1x1 convolutions."""
    if tensor.shape == shape:
        return tensor
    packed = tensor.packed.reshape(*shape[:-1], tensor.format.row_bytes(shape[-1]))
    return replace(tensor, packed=packed, shape=shape)


def _unpermuted(tensor: QuantTensor, heads: int) -> QuantTensor:
    """Undo llama.cpp's row order of q and k: inside a head it stores rows 0, D/2, 1, D/2 + 1, ...

    Whole rows move, so any block format will do. Source: llama.cpp, LlamaModel.permute.
    """
    packed = tensor.packed
    if len(tensor.shape) == 1:  # a bias: every number is a row
        packed = packed.view(tensor.shape[0], -1)
    pairs = packed.view(heads, packed.shape[0] // heads // 2, 2, packed.shape[1])
    return replace(tensor, packed=pairs.transpose(1, 2).reshape(tensor.packed.shape))


def _dense(tensor: QuantTensor, dtype: torch.dtype, where: str) -> Tensor:
    """The numbers in `dtype`, checked; small tensors only, the bulk is watched while it runs."""
    dense: Tensor = tensor.dequantize(dtype)
    if not bool(torch.isfinite(dense).all()):
        stored = tensor.dequantize(torch.float32)
        bad = int(torch.isfinite(stored).logical_not().sum())
        if bad:
            raise BadWeights(f"{where} holds {bad} NaN or infinite numbers; download the file again")
        largest = float(stored.abs().max())
        raise BadWeights(
            f"{where} holds {largest:g}, more than {dtype} can; use dtype=torch.bfloat16 or float32"
        )
    return dense
