"""Builds a network from an open file: on the meta device first, then the file's tensors are assigned.

Weights of Linear and Embedding stay packed, as views of the file, unless they are stored in the dtype of
the computation already; norms, biases, pad tokens and convolutions become dense tensors of that dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zimage_core.errors import BadArgument, BadWeights, printable
from zimage_core.models import ported
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.models.vision_tower import VisionTower
from zimage_core.nn.compute import set_compute
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant.arithmetic import MODES
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights import names, storage
from zimage_core.weights.card import require
from zimage_core.weights.components import open_component
from zimage_core.weights.opened import Opened
from zimage_core.weights.source import WeightFile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Network = TypeVar("Network", ZImageTransformer, TextEncoder, Autoencoder, VisionTower)
AnyNetwork = TypeVar("AnyNetwork", bound=ported.Network)
Module = TypeVar("Module", bound=nn.Module)

_TABLES: dict[type[nn.Module], Callable[..., names.Table]] = {
    ZImageTransformer: names.transformer_table,
    TextEncoder: names.text_encoder_table,
    Autoencoder: names.autoencoder_table,
    VisionTower: names.vision_table,
}


def opened_file(network: nn.Module) -> Opened | None:
    """The open file whose bytes a loaded network uses in place; None for a network built in memory."""
    return cast("Opened | None", getattr(network, "opened", None))


class _Uninitialised(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device its random functions would import the compiler, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_transformer(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
    compute: str = "exact",
) -> ZImageTransformer:
    """Load an S3-DiT; an Omni checkpoint as a `models.omni.OmniTransformer`, which takes images as well.

    Args:
        path: A GGUF or safetensors file, an index of shards, a component's folder, or a diffusers folder.
        dtype: The dtype of the computation: float32, float16 or bfloat16. Packed weights keep their own type.
        device: Device of the model.
        mmap: Use the weights in place; the file must not change meanwhile. False reads it into memory.
        compute: In which numbers the blocks multiply: "exact", "bfloat16", "int8", or "auto" for int8 where
            weights are packed and the device gains; see docs/benchmarks/quality.md.

    Raises:
        BadFile, UnknownFormat: The file cannot be opened.
        WrongModel: It holds another model; the message says what it is and what to get.
        BadWeights: Tensors are missing, unexpected or misshapen (all of them are listed), or hold NaN
            or infinity in norms, biases or pad tokens.
        Unsupported: Its weights are stored in a way that is not read.
    """
    return _load(ZImageTransformer, path, "transformer", dtype, device, mmap, compute)


def load_text_encoder(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
    compute: str = "exact",
) -> TextEncoder:
    """Load a Qwen3, Qwen2 or llama text encoder without its last layer and final norm.

    Arguments and errors are those of `load_transformer`.
    """
    return _load(TextEncoder, path, "text_encoder", dtype, device, mmap, compute)


def load_vae(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
) -> Autoencoder:
    """Load a Flux-style VAE. Arguments and errors are those of `load_transformer`."""
    return _load(Autoencoder, path, "vae", dtype, device, mmap)


def load_siglip(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
    compute: str = "exact",
) -> VisionTower:
    """Load a SigLIP2 (NaFlex) vision tower without its pooling head, of which Z-Image-Omni reads images.

    A whole SigLIP2 will do, and a GGUF with llama.cpp's mmproj names. Arguments and errors are those of
    `load_transformer`.
    """
    return _load(VisionTower, path, "siglip", dtype, device, mmap, compute)


def _load(
    kind: type[Network],
    path: str | PathLike[str],
    component: str,
    dtype: torch.dtype,
    device: str | torch.device,
    mmap: bool,
    compute: str = "exact",
) -> Network:
    if dtype not in DTYPES:
        raise BadArgument(f"dtype is {dtype}, wanted one of {', '.join(str(d) for d in DTYPES)}")
    if compute not in MODES:
        raise BadArgument(f"compute is {printable(compute, 40)}; it must be one of {', '.join(MODES)}")
    opened = open_component(path, component, mmap)
    try:
        require(opened.card, component, opened.file.path)
        network = load_network(kind, opened, dtype, device)
        if compute != "exact":
            set_compute(network, compute, torch.device(device))
        return network
    except BaseException:
        opened.file.close()
        raise


def load_network(
    kind: type[Network], opened: Opened, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Network:
    """Build a network from an open file that passed `require`; the network keeps the file open.

    Args:
        kind: The network's class.
        opened: The open file with its card.
        dtype: The dtype of the computation.
        device: Device of the network.

    Raises:
        BadWeights: A dense tensor holds NaN or infinity, or does not fit float16.
    """
    file, card = opened.file, opened.card
    if card.config is None:
        raise BadWeights(f"{printable(file.path)}: its size cannot be told")
    for caution in card.cautions:
        warnings.warn(f"{printable(file.path)}: {caution}", UserWarning, stacklevel=2)
    table = _TABLES[kind](card.config, card.layout)
    config: Any = card.config  # `require` has checked the kind
    if card.variant == "omni":
        from zimage_core.models.omni import OmniTransformer

        kind = cast("type[Network]", OmniTransformer)
    return assembled(partial(kind, config), opened, table, dtype, device)


def assembled(
    make: Callable[[], AnyNetwork],
    opened: Opened,
    table: names.Table,
    dtype: torch.dtype,
    device: str | torch.device,
) -> AnyNetwork:
    """A network, made on the meta device, with the tensors of an open file, which it keeps.

    Args:
        make: Makes the network.
        opened: The open file with its card.
        table: Where the network's tensors are in it.
        dtype: The dtype of the computation.
        device: Device of the network.

    Raises:
        BadWeights: A dense tensor holds NaN or infinity, or does not fit float16.
    """
    model = unfilled(make, dtype)
    fill(model, opened.file, table, opened.card.prefix, dtype)
    model.opened = opened
    return model.to(device)


def unfilled(make: Callable[[], Module], dtype: torch.dtype) -> Module:
    """A module on the meta device, whose layers have the dtype of the computation, for `fill`."""
    with torch.device("meta"), _Uninitialised():
        model = make()
    model.to(dtype)  # the dtype of a layer decides which weights stay packed
    return model.requires_grad_(False).eval()


def fill(model: nn.Module, file: WeightFile, table: names.Table, prefix: str, dtype: torch.dtype) -> None:
    """Assign every entry of the table from the file.

    Raises:
        BadWeights: A dense tensor holds NaN or infinity, or does not fit float16; or one holds whole numbers
            without a scale.
    """
    for name, entries in names.sources(table).items():
        whole = _shaped(storage.scaled_tensor(file, prefix + name), entries[0].stored_shape)
        if whole.format.is_integer and whole.scale is None:
            where = f"{printable(file.path)}: {printable(prefix + name, 120)}"
            raise BadWeights(f"{where} is {whole.format.name} without a scale; {storage.WAY_ROUND}")
        for entry in entries:
            part = whole if entry.rows is None else whole.rows(*entry.rows)
            if entry.heads:
                part = _unpermuted(part, entry.heads)
            if entry.conv:
                part = _channels_last(part)
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

    Whole rows move, with their scales, so any block format will do. Source: llama.cpp, LlamaModel.permute.
    """

    def moved(rows: Tensor) -> Tensor:
        pairs = rows.view(heads, tensor.shape[0] // heads // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(rows.shape)

    scale = tensor.scale if tensor.scale is None or tensor.scale.numel() == 1 else moved(tensor.scale)
    return tensor.like(moved(tensor.packed), scale=scale)


def _channels_last(tensor: QuantTensor) -> QuantTensor:
    """A convolution over patches [N, C, P, P] of plain numbers as the matrix [N, P * P * C] that it is."""
    rows, channels, side, _ = tensor.shape
    numbers = tensor.packed.view(rows, channels, side, side, -1).permute(0, 2, 3, 1, 4)
    return tensor.like(numbers.reshape(rows, -1), shape=(rows, side * side * channels))


def _dense(tensor: QuantTensor, dtype: torch.dtype, where: str) -> Tensor:
    """The dense numbers in `dtype`, checked. Only small tensors come here; packed weights are not checked."""
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
