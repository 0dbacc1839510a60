"""Images of a caller, of any kind: files, Pillow images, NumPy arrays, torch tensors, and lists of them.

The rules, in this order:

- A turn that EXIF asks for is applied; of an animation the first frame counts, or the one that a Pillow image
  stands at.
- 16 bits become 8 by v / 257, rounded; integers of 32 bits ("I") count as 16 bits, cut to 0..65535;
  floats ("F") lie in 0..1, or in 0..255 if one is above 1.
- Transparent parts are composed on white, and on black in a mask.
- Palettes, CMYK and other modes become RGB by Pillow's conversion, which ignores colour profiles.
- Arrays and tensors are whole numbers (uint8, uint16, bool) or floats in [0, 1]; floats below 0 mean that
  they lie in [-1, 1], as in diffusers. Channels are last in NumPy and first in torch.

A resize is that of diffusers' image processor, to the bit: Lanczos for Pillow images and files, nearest for
floats. Arrays of whole numbers are treated as Pillow images.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from zimage_core.errors import BadArgument, BadFile, BadShape, ZImageError, printable

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
"""Kinds of files that are opened; Pillow knows more, some of which start other programs."""
MAX_PIXELS = 1 << 26
"""Most pixels of an image that is read, 67 millions: a small file can claim more than memory holds."""
MAX_IMAGES = 1024
GRAY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value, as in Pillow (ITU-R 601-2)."""

Picture = Image.Image | Tensor
"""A Pillow image of mode 1, L or RGB, or a float32 tensor [C, H, W] in [0, 1] with 1 or 3 channels."""


@dataclass(frozen=True)
class Pictures:
    """Images as they were given, of any sizes.

    Args:
        members: At least one image.
        gray: Whether they are masks: one channel instead of three.
        sha256: Hash of each argument: of the bytes of a file, or of the values of an array.
    """

    members: tuple[Picture, ...]
    gray: bool
    sha256: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first image."""
        return _size(self.members[0])

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image."""
        return [_size(member) for member in self.members]

    def at(self, height: int, width: int) -> Tensor:
        """All images in one size: float32 [B, 3, height, width] in [0, 1], or [B, 1, ...] for masks."""
        return torch.stack([self._one(member, height, width) for member in self.members])

    def _one(self, member: Picture, height: int, width: int) -> Tensor:
        if isinstance(member, Image.Image):
            image = member if self.gray or member.mode == "RGB" else member.convert("RGB")
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            values = np.array(image.convert("L") if self.gray else image).astype(np.float32) / 255.0
            return torch.from_numpy(values[None] if self.gray else values.transpose(2, 0, 1).copy())
        if _size(member) != (height, width):
            member = torch.nn.functional.interpolate(member[None], size=(height, width))[0]
        if self.gray and len(member) == 3:
            return torch.einsum("c,chw->hw", torch.tensor(GRAY), member)[None]
        return member if self.gray else member.expand(3, -1, -1)


def read_image(value: Any, name: str, height: int | None = None, width: int | None = None) -> Tensor:
    """An image argument as the VAE takes it: float32 [B, 3, H, W] in [-1, 1] on the CPU.

    Args:
        value: What `open_images` takes.
        name: Name of the argument, for messages.
        height: Height to resize to; default: that of the first image.
        width: Width to resize to, with the same default.

    Raises:
        BadArgument, BadShape, BadFile: As for `open_images`.
    """
    pictures = open_images(value, name)
    own = pictures.size
    return 2.0 * pictures.at(own[0] if height is None else height, own[1] if width is None else width) - 1.0


def open_images(value: Any, name: str, gray: bool = False) -> Pictures:
    """Read and check an image argument.

    Args:
        value: A path, a Pillow image, a NumPy array [H, W], [H, W, C] or [B, H, W, C], a tensor [H, W],
            [C, H, W] or [B, C, H, W], or a list of these. C is 1, 3, or 4 with transparency. For masks three
            dimensions are [B, H, W], and [H, W, C] if the last is at most 4.
        name: Name of the argument, for messages.
        gray: Whether these are masks.

    Raises:
        BadArgument: It is none of these, empty, or holds values out of range.
        BadShape: An array has another shape.
        BadFile: A file is missing, damaged, no image, or claims more than `MAX_PIXELS`.
    """
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if not 1 <= len(given) <= MAX_IMAGES:
        raise BadArgument(f"{name}: got {len(given)} images, wanted 1 to {MAX_IMAGES}")
    members: list[Picture] = []
    hashes = []
    for i, each in enumerate(given):
        found, sha256 = _open(each, name if each is value else f"{name}[{i}]", gray)
        members += found
        hashes.append(sha256)
    if len(members) > MAX_IMAGES:
        raise BadArgument(f"{name}: got {len(members)} images, wanted at most {MAX_IMAGES}")
    return Pictures(tuple(members), gray, tuple(hashes))


def probe(path: str, name: str) -> str:
    """Check an image file by its header alone, without decoding it.

    Args:
        path: The file.
        name: Name of the argument, for messages.

    Returns:
        SHA-256 of the file in hexadecimal, as in `Pictures`.

    Raises:
        BadFile: It is missing, no image, or claims more than `MAX_PIXELS`.
    """
    return _file(path, name, gray=False, decode=False)[1]


def _size(member: Picture) -> tuple[int, int]:
    if isinstance(member, Image.Image):
        return member.height, member.width
    return member.shape[-2], member.shape[-1]


def _open(value: Any, name: str, gray: bool) -> tuple[list[Picture], str]:
    if isinstance(value, (str, os.PathLike)):
        return _file(value, name, gray)
    if isinstance(value, Image.Image):
        members = [_decoded(lambda: value, gray, lambda fault: BadArgument(f"{name}: {fault}"))]
        return [*members], _hash(members[0].mode, members[0].size, members[0].tobytes())
    if isinstance(value, Tensor):
        array = _from_torch(value, name, gray)
    elif isinstance(value, np.ndarray):
        array = _from_numpy(value, name, gray)
    else:
        raise BadArgument(
            f"{name}: got a {printable(type(value).__name__, 60)}, wanted a path, a Pillow image, a NumPy "
            "array, a torch tensor, or a list of these"
        )
    return _from_arrays(array, name, gray), _hash(array.dtype, array.shape, array.tobytes())


def _hash(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()


# --- files and Pillow images ---


def _file(path: Any, name: str, gray: bool, decode: bool = True) -> tuple[list[Picture], str]:
    place = os.fspath(path)
    if not isinstance(place, str) or not place or "\0" in place:
        raise BadArgument(f"{name}: got {printable(repr(place), 60)}, wanted the path of an image")
    if not Path(place).is_file():
        raise BadFile(place, f"is not a file that {name} could read", "give the path of an image")
    Image.init()
    kinds = [kind for kind in KINDS if kind in Image.OPEN]
    try:
        with Path(place).open("rb") as file:
            image = _decoded(
                lambda: Image.open(file, formats=kinds), gray, lambda fault: BadFile(place, fault), decode
            )
            file.seek(0)
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise BadFile(place, f"cannot be read ({printable(error.strerror or error, 100)})") from None
    return [image], found.hexdigest()


def _decoded(
    source: Callable[[], Image.Image],
    gray: bool,
    fault: Callable[[str], ZImageError],
    decode: bool = True,
) -> Image.Image:
    """The image of a source in mode 1, L or RGB, or as it is without `decode`.

    `fault` makes an error of a sentence's end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, and sooner
            image = source()
            width, height = image.size
            if width < 1 or height < 1:
                raise fault(f"is an image of {width} x {height} pixels, which is empty")
            if width * height > MAX_PIXELS:
                raise fault(
                    f"claims {width} x {height} pixels, wanted at most {MAX_PIXELS / 1e6:.0f} million; "
                    "make it smaller first"
                )
            return _flat(image, 0 if gray else 255) if decode else image
    except ZImageError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, checked before the size is known here
        most = f"{MAX_PIXELS / 1e6:.0f} million"
        raise fault(f"claims more than {most} pixels; make it smaller first") from None
    except UnidentifiedImageError:
        raise fault(f"is no image of a kind that is read; give a file of {', '.join(KINDS)}") from None
    except MemoryError:
        raise fault("is an image that does not fit in memory") from None
    except Exception as error:  # noqa: BLE001  damaged files make decoders raise nearly anything
        reason = printable(str(error) or type(error).__name__, 100)
        raise fault(
            f"is a damaged image ({reason}), or of a mode that cannot be read; save it again"
        ) from None


def _flat(image: Image.Image, background: int) -> Image.Image:
    """A copy in mode 1, L or RGB, upright, without transparency."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image))
    if image.has_transparency_data:
        top = image.convert("RGBA")
        under = Image.new("RGBA", top.size, (background, background, background, 255))
        return Image.alpha_composite(under, top).convert("RGB")
    return image.copy() if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray[Any, Any]:
    """Values of a mode with more than 8 bits as uint8 [H, W]."""
    values: np.ndarray[Any, Any] = np.asarray(image).astype(np.float64)
    if image.mode != "F":
        return np.round(values.clip(0, 65535) / 257).astype(np.uint8)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    scale = 255 if values.max() <= 1 else 1
    return np.round(values.clip(0, 255) * scale).astype(np.uint8)


# --- arrays and tensors ---


def _from_torch(value: Tensor, name: str, gray: bool) -> np.ndarray[Any, Any]:
    """A tensor as an array [B, H, W, C]."""
    found = value.detach().cpu()
    if found.dtype in (torch.bfloat16, torch.float16):
        found = found.float()
    if found.ndim == 2:
        found = found[None, None]
    elif found.ndim == 3:
        found = found[:, None] if gray else found[None]
    if found.ndim != 4 or found.shape[1] not in (1, 3, 4):
        raise BadShape(
            f"{name}: got a tensor of shape {tuple(value.shape)}, wanted [H, W], [C, H, W] or [B, C, H, W] "
            "with 1, 3 or 4 channels"
        )
    array: np.ndarray[Any, Any] = found.permute(0, 2, 3, 1).numpy()
    return array


def _from_numpy(value: np.ndarray[Any, Any], name: str, gray: bool) -> np.ndarray[Any, Any]:
    """An array as [B, H, W, C]."""
    array = value
    if array.ndim == 2:
        array = array[None, :, :, None]
    elif array.ndim == 3:
        array = array[..., None] if gray and array.shape[-1] > 4 else array[None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
        raise BadShape(
            f"{name}: got an array of shape {value.shape}, wanted [H, W], [H, W, C] or [B, H, W, C] with "
            "1, 3 or 4 channels"
        )
    return array


def _from_arrays(array: np.ndarray[Any, Any], name: str, gray: bool) -> list[Picture]:
    """Images [B, H, W, C] one by one."""
    if not 1 <= len(array) <= MAX_IMAGES or 0 in array.shape:
        size = f"{len(array)} images of {array.shape[2]} x {array.shape[1]} pixels"
        raise BadShape(f"{name}: got {size}, wanted 1 to {MAX_IMAGES} that are not empty")
    if array.shape[1] * array.shape[2] > MAX_PIXELS:
        raise BadArgument(
            f"{name}: got {array.shape[2]} x {array.shape[1]} pixels, wanted at most "
            f"{MAX_PIXELS / 1e6:.0f} million"
        )
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    if array.dtype == np.uint8:
        background = 0 if gray else 255
        return [_flat(Image.fromarray(_squeezed(each)), background) for each in array]
    if not np.issubdtype(array.dtype, np.floating):
        raise BadArgument(f"{name}: got values of {array.dtype}, wanted uint8, or floats in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1 and high <= 1):  # NaN is in no range
        raise BadArgument(
            f"{name}: got floats from {low:g} to {high:g}, wanted [0, 1] (or [-1, 1]); divide by 255, or "
            "give uint8"
        )
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).permute(0, 3, 1, 2)
    if low < 0:
        values = values / 2 + 0.5
    if values.shape[1] == 4:
        alpha = values[:, 3:]
        values = values[:, :3] * alpha + (0.0 if gray else 1.0) * (1 - alpha)
    return list(values)


def _squeezed(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[H, W, C] as Pillow takes it: without a single channel."""
    return array[..., 0] if array.shape[-1] == 1 else array


def expand(values: Tensor, count: int, name: str) -> Tensor:
    """Repeat images [B, ...] to `count`, each next to its copies, as the images of one prompt are.

    Raises:
        BadArgument: B does not divide `count`.
    """
    if count % len(values):
        others = "; images beside the prompt of an Omni checkpoint are reference_images=" * (name == "image")
        raise BadArgument(
            f"{name}: got {len(values)} for a run of {count} images, wanted one, or a number that divides it"
            + others
        )
    return values.repeat_interleave(count // len(values), dim=0)
