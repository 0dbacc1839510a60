"""TAEF1, a decoder of FLUX.1's latents with 1.2 million parameters, for previews.

Source: https://github.com/madebyollin/taesd (MIT); its file is madebyollin/taef1 on the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.errors import BadShape, WrongModel, printable
from zimage_core.weights.identify import identify
from zimage_core.weights.opened import open_weights
from zimage_core.weights.source import WeightFile
from zimage_core.weights.storage import scaled_tensor, storage_problem

WIDTH, CHANNELS = 64, 16
LAYERS = ("first", "relu", *(("block",) * 3 + ("double", "plain")) * 3, "block", "last")
"""The layers in order; the place in this list is the number in diffusers' names."""
NAMINGS = (("decoder.layers.", 0), ("taesd_decoder.", 1), ("", 1))
"""Prefix and first number of the names: diffusers', ComfyUI's, and the original decoder's own file."""
CLAMP = 3.0
GET = "get diffusion_pytorch_model.safetensors of madebyollin/taef1"


def table() -> dict[str, tuple[int, ...]]:
    """Name of every tensor, without the prefix and counted from 0 -> its shape."""
    kernel = (3, 3)
    found: dict[str, tuple[int, ...]] = {}
    for i, layer in enumerate(LAYERS):
        if layer == "block":
            for part in (0, 2, 4):
                found[f"{i}.conv.{part}.weight"] = (WIDTH, WIDTH, *kernel)
                found[f"{i}.conv.{part}.bias"] = (WIDTH,)
        elif layer in ("first", "plain", "last"):
            rows, cols = (3 if layer == "last" else WIDTH), (CHANNELS if layer == "first" else WIDTH)
            found[f"{i}.weight"] = (rows, cols, *kernel)
            if layer != "plain":
                found[f"{i}.bias"] = (rows,)
    return found


class TinyDecoder:
    """The decoder in float32, from tensors with the names and shapes of `table`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._weights["0.weight"].device

    def to(self, device: str | torch.device) -> TinyDecoder:
        """The same decoder on a device."""
        return TinyDecoder({name: tensor.to(device) for name, tensor in self._weights.items()})

    def _convolve(self, x: Tensor, name: str) -> Tensor:
        return functional.conv2d(
            x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"), padding=1
        )

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents as the transformer has them [B, 16, h, w] -> pixels [B, 3, 8 h, 8 w] about [-1, 1].

        Raises:
            BadShape: The latents have another shape.
        """
        if latents.ndim != 4 or latents.shape[1] != CHANNELS:
            raise BadShape(f"TAEF1: got {tuple(latents.shape)}, wanted latents [B, {CHANNELS}, h, w]")
        x = torch.tanh(latents.float() / CLAMP) * CLAMP
        for i, layer in enumerate(LAYERS):
            if layer == "relu":
                x = x.relu()
            elif layer == "double":
                x = functional.interpolate(x, scale_factor=2)
            elif layer == "block":
                inner = self._convolve(self._convolve(x, f"{i}.conv.0").relu(), f"{i}.conv.2").relu()
                x = (self._convolve(inner, f"{i}.conv.4") + x).relu()
            else:
                x = self._convolve(x, str(i))
        return x * 2 - 1


def load(path: str | PathLike[str]) -> TinyDecoder:
    """Read the decoder of a file, whether or not it has the encoder too.

    Raises:
        BadFile: The file cannot be opened.
        WrongModel: It is another model, or lacks tensors, or holds NaN or infinity; the message says so.
    """
    with open_weights(path, mmap=False) as file:
        wanted = table()
        names = _names(file, wanted)
        if problem := storage_problem(file):
            raise WrongModel(file.path, f"this is TAEF1: {problem}", GET)
        weights = {name: scaled_tensor(file, names[name]).dequantize(torch.float32) for name in wanted}
        for name, tensor in weights.items():
            if not bool(torch.isfinite(tensor).all()):
                raise WrongModel(file.path, f"{names[name]} holds NaN or infinity", "download the file again")
    return TinyDecoder({name: tensor.contiguous() for name, tensor in weights.items()})


def _names(file: WeightFile, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in the table -> name in the file, by the naming that the file has."""
    for prefix, first in NAMINGS:
        names = {}
        for name in wanted:
            number, _, rest = name.partition(".")
            names[name] = f"{prefix}{int(number) + first}.{rest}"
        found = [own for own in names.values() if own in file.tensors]
        if len(found) < len(names) / 2:
            continue
        for name, own in names.items():
            shape = file.tensors[own].shape if own in file.tensors else None
            if shape != wanted[name]:
                fault = (
                    f"{own} is {'missing' if shape is None else f'{list(shape)}'}, not {list(wanted[name])}"
                )
                raise WrongModel(file.path, f"a tiny autoencoder, but not TAEF1's: {fault}", GET)
        return names
    title = printable(identify(file).title, 120)
    raise WrongModel(file.path, f"this is {title}, where TAEF1 is wanted", GET)
