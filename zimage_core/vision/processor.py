"""transformers' Siglip2ImageProcessor, reimplemented: pixels to patches, without padding.

An image keeps its aspect and gets as many patches as fit into `max_num_patches`; small images are enlarged.
The resize is Pillow's, as in transformers without torchvision. With torchvision, transformers resizes by
torch's kernel for bytes, which gives some bytes otherwise; docs/explanation/numerics.md has the share.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zimage_core.errors import BadArgument, BadFile, BadShape, Unsupported
from zimage_core.fields import Fields
from zimage_core.files.untrusted import read_json
from zimage_core.models.vision_tower import VisionTower

CONFIG = "preprocessor_config.json"
FOLDER = "siglip_processor"
"""Folder of a pipeline in diffusers' layout that holds the file."""
MOST_PATCHES = 1 << 14
MOST_PIXELS = 1 << 26
"""Most pixels of the image between the two passes of a resize, 268 MB."""

_PRECISION, _MOST_SCALE = 1e-5, 100.0


@dataclass(frozen=True)
class Processor:
    """Settings of the image processor; the defaults are those of Z-Image-Omni's SigLIP2.

    Args:
        patch_size: Side of a patch, in pixels.
        max_num_patches: Most patches of an image.
        mean: Subtracted from each channel in [0, 1].
        std: What is left is divided by it.
    """

    patch_size: int = 16
    max_num_patches: int = 256
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Processor:
        """Settings of a preprocessor_config.json.

        Raises:
            BadArgument: The file describes another processor; the message names the field.
        """
        read = Fields(CONFIG, data)
        kinds = ("Siglip2ImageProcessor", "Siglip2ImageProcessorFast", "Siglip2ImageProcessorPil")
        read.only("image_processor_type", *kinds)
        for name in ("do_resize", "do_rescale", "do_normalize"):
            read.only(name, True)
        read.only("resample", 2)
        read.only("do_center_crop", False)
        factor = read.number("rescale_factor", 1 / 255, low=0, high=1)
        if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            read.refuse("rescale_factor", "1 / 255", "; other values are not supported")
        most = read.whole("max_num_patches", cls.max_num_patches)
        if most > MOST_PATCHES:
            read.refuse("max_num_patches", f"at most {MOST_PATCHES}")
        mean, std = _triple(read, "image_mean", cls.mean), _triple(read, "image_std", cls.std)
        if min(std) <= 0:
            read.refuse("image_std", "numbers above 0")
        return cls(read.whole("patch_size", cls.patch_size), most, mean, std)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, and transformers too."""
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "do_resize": True,
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "max_num_patches": self.max_num_patches,
            "patch_size": self.patch_size,
        }

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along each side of an image: at least one, and at most `max_num_patches` in all.

        The scale is searched by halving an interval, and each side is rounded up to whole patches.
        """
        low, high = _PRECISION / 10, _MOST_SCALE
        while high - low >= _PRECISION:
            scale = (low + high) / 2
            if math.prod(self._sides(scale, height, width)) <= self.max_num_patches:
                low = scale
            else:
                high = scale
        return self._sides(low, height, width)

    def _sides(self, scale: float, height: int, width: int) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / self.patch_size)) for side in (height, width))
        return rows, columns

    def patches(self, pixels: Tensor | np.ndarray[Any, Any]) -> tuple[Tensor, tuple[int, int]]:
        """Patches of an image, as `VisionTower.forward` takes them.

        Args:
            pixels: uint8 [H, W, 3].

        Returns:
            float32 [h_s * w_s, patch_size^2 * 3] row by row, channels last in a patch, and (h_s, w_s).

        Raises:
            BadShape: The pixels are no such array.
            Unsupported: The image is so long and thin that its resize would need much memory.
        """
        array = _bytes_of(pixels)
        height, width = array.shape[:2]
        rows, columns = self.grid(height, width)
        size = self.patch_size
        if max(rows * columns * size * size, height * columns * size) > MOST_PIXELS:
            raise Unsupported(
                f"vision: an image of {width} x {height} pixels is too long and thin for {columns} x {rows} "
                "patches; make it smaller or crop it"
            )
        image = Image.fromarray(array).resize((columns * size, rows * size), Image.Resampling.BILINEAR)
        # the order of roundings is transformers': float64, float32, then the normalisation in float32
        unit = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
        values = torch.from_numpy((unit - np.array(self.mean, np.float32)) / np.array(self.std, np.float32))
        cut = values.view(rows, size, columns, size, 3)
        return cut.transpose(1, 2).reshape(rows * columns, -1), (rows, columns)


def processor_of(tower: VisionTower) -> Processor:
    """The processor that belongs to a tower: its attribute `processor`, else what is stated beside its file.

    A preprocessor_config.json is looked for beside the weights, then in the folder `siglip_processor` of a
    pipeline.

    Raises:
        BadFile: The file cannot be read, or describes another processor.
    """
    if isinstance(tower.processor, Processor):
        return tower.processor
    path = getattr(getattr(tower.opened, "file", None), "path", None)
    found = None if path is None else _config_file(Path(path))
    if found is None:
        return Processor(patch_size=tower.config.patch_size)
    try:
        processor = Processor.from_json(read_json(found))
        if processor.patch_size != (own := tower.config.patch_size):
            raise BadArgument(f"patch_size is {processor.patch_size}, that of the vision tower is {own}")
    except BadArgument as error:
        raise BadFile(found, f"describes another image processor: {error}", "get SigLIP2's own") from None
    return processor


def encode(
    tower: VisionTower, pixels: Tensor | np.ndarray[Any, Any], processor: Processor | None = None
) -> Tensor:
    """Features of one image as a map.

    Args:
        tower: The vision tower.
        pixels: uint8 [H, W, 3].
        processor: Settings; default: those that belong to the tower.

    Returns:
        [h_s, w_s, hidden] on the tower's device; float32 when the tower is float16.

    Raises:
        BadShape: The pixels are no such array, or the processor's patches are not the tower's.
        Unsupported: The image is too long and thin.
        BadFile: The preprocessor_config.json beside the tower's file does not fit.
    """
    patches, grid = (processor or processor_of(tower)).patches(pixels)
    with torch.no_grad():
        features: Tensor = tower(patches, grid)
    return features.view(*grid, -1)


def _config_file(weights: Path) -> Path | None:
    """The preprocessor_config.json that belongs to a file of weights, or to a folder of shards."""
    folder = weights if weights.is_dir() else weights.parent
    places = (folder / CONFIG, folder / FOLDER / CONFIG, folder.parent / FOLDER / CONFIG)
    return next((place for place in places if os.path.lexists(place)), None)


def _bytes_of(pixels: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The pixels as an array that Pillow takes."""
    array = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise BadShape(
            f"vision: got an image of {array.dtype} {tuple(array.shape)}, wanted uint8 [H, W, 3] with sides "
            "above 0"
        )
    return np.ascontiguousarray(array)


def _triple(read: Fields, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """A number for each of red, green and blue."""
    value = read.get(name, list(default))
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        read.refuse(name, "a list of three numbers")
    inner = Fields(f"{read.owner}: {name}", {str(i): item for i, item in enumerate(value)})
    first, second, third = (inner.number(str(i), low=-10, high=10) for i in range(3))
    return first, second, third
