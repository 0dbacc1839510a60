"""Recognise ControlNets of Z-Image by their tensors, and tell their variants apart.

Source: the files of VideoX-Fun's trainer ("Fun-Controlnet-Union"); docs/guides/control.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from zimage_core.weights.card import ModelCard
from zimage_core.weights.infer import Shape, count_layers

if TYPE_CHECKING:
    from zimage_core.weights.source import WeightFile

EMBEDDER = "control_all_x_embedder.2-1"
"""Name of the embedder of control latents; its width tells how many channels they have."""
LAYERS, REFINER = "control_layers", "control_noise_refiner"
PATCH = 2
"""Side of a patch of every released ControlNet, in latents."""

PLAIN = "plain"
"""The control latents pass through plain blocks, as in Union 1.0; their result is not added anywhere."""
OWN = "control_noise_refiner"
"""Control blocks of its own steer the noise refiner, as in Union 2.1."""
SHARED = "control_layers"
"""The control layers steer the noise refiner as well: a fault of the training of Union 2.0, kept for it."""

_CHUNK = 1 << 20


def refiner_kind(shapes: Mapping[str, Shape], channels: int, untrained: Callable[[str], bool]) -> str:
    """How a ControlNet steers the noise refiner.

    Control latents with an even number of channels have no mask and belong to 1.0. Of the others, 2.1 has
    refiner blocks with projections that were trained; files of 2.0 lack them, or hold zeros.

    Args:
        shapes: Tensor name without prefix -> shape.
        channels: Channels of the control latents.
        untrained: Whether a tensor holds one and the same number, by its name without prefix.

    Returns:
        `PLAIN`, `OWN` or `SHARED`.
    """
    if channels % 2 == 0:
        return PLAIN
    before, after = (f"{REFINER}.0.{part}_proj.weight" for part in ("before", "after"))
    if before not in shapes or untrained(before):
        return SHARED
    return SHARED if after in shapes and untrained(after) else OWN


def variant_of(refiner: str, layers: int) -> str:
    """Name of the variant: "1.0", "2.0" or "2.1", with "lite" for few layers."""
    version = {PLAIN: "1.0", SHARED: "2.0", OWN: "2.1"}[refiner]
    return f"{version} lite" if refiner != PLAIN and layers < 6 else version


def repeats(file: WeightFile, name: str) -> bool:
    """Whether a tensor holds one block over and over, as zeros do in every format; stops at the first other.

    Raises:
        BadFile: The file cannot be read.
    """
    info = file.tensors.get(name)
    if info is None or not info.nbytes:
        return False
    source, size = file.source_of(name), info.format.nbytes
    block = bytes(source.read_at(info.offset, size))
    step = _CHUNK // size * size
    for start in range(0, info.nbytes, step):
        count = min(step, info.nbytes - start)
        if source.read_at(info.offset + start, count) != block * (count // size):
            return False
    return True


def identify_controlnet(file: WeightFile) -> ModelCard | None:
    """Card of a Z-Image ControlNet (Fun-Controlnet-Union and relatives); None for any other file."""
    embedder = next((n for n in file.tensors if n.endswith(f"{EMBEDDER}.weight")), None)
    if embedder is None:
        return None
    prefix = embedder.removesuffix(f"{EMBEDDER}.weight")
    inside = {n[len(prefix) :]: info.shape for n, info in file.tensors.items() if n.startswith(prefix)}
    layers, shape = count_layers(inside, LAYERS), file.tensors[embedder].shape
    channels = shape[1] // PATCH**2 if len(shape) == 2 else 0
    refiner = refiner_kind(inside, channels, lambda name: repeats(file, prefix + name))
    variant = variant_of(refiner, layers)
    title = f"a Z-Image ControlNet ({variant}, {layers} control layers, {channels} control channels)"
    fused = any(".attention.qkv.weight" in name for name in inside)
    apart = any(name.endswith(".attention.qkv.weight.1") for name in inside)
    return ModelCard(
        "controlnet",
        "z-image",
        title,
        variant=variant,
        layout="sdcpp" if apart else "fused" if fused else "split",
        prefix=prefix,
        notes=("it steers a run: zimage generate --controlnet FILE --control IMAGE",),
    )
