"""Checks of a run's arguments, before any weight is read; each error names the argument and its range."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from zimage_core.errors import BadArgument, BadShape, Unsupported, printable
from zimage_core.quant.arithmetic import MODES
from zimage_core.sampling.noise import MAX_SEED
from zimage_core.text.prompt import check_prompt

MAX_PIXELS = 4096 * 4096
"""Most pixels of an image: the time of attention grows with their square, and this many take hours."""
MAX_BATCH_PIXELS = 256 * 1024 * 1024
"""Most pixels of one call: 256 images of 1024 x 1024, which take 3.2 GB in float32."""
MAX_IMAGES = 1024
MAX_GUIDANCE = 30.0
MAX_VARIETY = 100.0
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "denoised")

Embeds = Sequence[torch.Tensor]
StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], "dict[str, Any] | None"]
"""Type of diffusers' `callback_on_step_end`: (pipeline, step, timestep, tensors) -> tensors to replace."""


def shown(value: object) -> str:
    """Text of a value for a message: short, one line, and safe for integers of any length."""
    if isinstance(value, int) and abs(value) >> 200:
        return f"an integer of {value.bit_length()} bits"
    try:
        return printable(repr(value), 60)
    except ValueError:  # a list that holds an integer too long to print
        return f"a {type(value).__name__}"


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer in [low, high]; booleans and fractions are refused."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise BadArgument(f"{name}: got {shown(value)}, wanted an integer from {low} to {high}")
    return number


def real(name: str, value: Any, low: float, high: float) -> float:
    """Return a finite number in [low, high] as a float."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not low <= number <= high:
        raise BadArgument(f"{name}: got {shown(value)}, wanted a number from {low:g} to {high:g}")
    return number


def side(name: str, value: Any, multiple: int, most: int) -> int:
    """Return a height or width in pixels: a multiple of `multiple`, at most `most`."""
    pixels = whole(name, value, 1, most)
    if pixels % multiple:
        below = pixels // multiple * multiple
        sizes = [s for s in (below, below + multiple) if multiple <= s <= most]
        nearest = " and ".join(str(s) for s in sizes)
        raise BadArgument(
            f"{name}: got {pixels}, wanted a multiple of {multiple}; "
            f"the nearest {'is' if len(sizes) == 1 else 'are'} {nearest}"
        )
    return pixels


def area(height: int, width: int, images: int) -> None:
    """Refuse images that are too large to finish, and more images at once than memory is likely to hold."""
    if height * width * images > MAX_BATCH_PIXELS:
        raise BadArgument(
            f"num_images_per_prompt: {images} images of {width} x {height} in one call, wanted at most "
            f"{MAX_BATCH_PIXELS // (height * width)} of this size; make the others in further calls"
        )
    if height * width > MAX_PIXELS:
        raise BadArgument(
            f"height and width: {width} x {height} are {height * width / 1e6:.1f} megapixels, wanted at most "
            f"{MAX_PIXELS / 1e6:.1f}"
        )


def prompts(name: str, value: Any) -> list[str]:
    """Return one prompt, or several, as a new list."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_IMAGES:
        raise BadArgument(
            f"{name}: got {shown(value)}, wanted a string or a list of 1 to {MAX_IMAGES} strings"
        )
    for text in value:
        check_prompt(text)
    return list(value)


def embeds(name: str, value: Any, width: int) -> list[torch.Tensor]:
    """Return the caller's caption features as a new list of [L, width]."""
    members = list(value) if isinstance(value, (list, tuple, torch.Tensor)) else []
    if not 1 <= len(members) <= MAX_IMAGES:
        raise BadArgument(f"{name}: wanted a list of 1 to {MAX_IMAGES} tensors [L, {width}]")
    for i, member in enumerate(members):
        if not isinstance(member, torch.Tensor) or not member.is_floating_point():
            raise BadArgument(f"{name}[{i}]: wanted a floating-point tensor [L, {width}]")
        if member.ndim != 2 or member.shape[1] != width or len(member) == 0:
            raise BadShape(
                f"{name}[{i}]: got shape {tuple(member.shape)}, wanted [L, {width}] with L >= 1, the "
                "hidden states of the text encoder that belongs to this transformer"
            )
        if not bool(torch.isfinite(member).all()):
            raise BadArgument(f"{name}[{i}]: holds NaN or infinity")
    return members


def pieces(name: str, value: Any, width: int) -> list[list[torch.Tensor]]:
    """Return the caller's features of Omni prompts as new lists: for each prompt one [L, width] a piece."""
    members = list(value) if isinstance(value, (list, tuple)) else []
    if not 1 <= len(members) <= MAX_IMAGES or any(isinstance(each, torch.Tensor) for each in members):
        raise BadArgument(
            f"{name}: wanted a list of 1 to {MAX_IMAGES} lists of tensors [L, {width}], one for each piece "
            "of a prompt"
        )
    return [embeds(f"{name}[{i}]", member, width) for i, member in enumerate(members)]


def latents(value: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a float32 copy of the caller's starting latents, which must have `shape`."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise BadArgument(f"latents: wanted a floating-point tensor of shape {shape}")
    if tuple(value.shape) != shape:
        raise BadShape(
            f"latents: got shape {tuple(value.shape)}, wanted {shape} for this batch and image size"
        )
    if not bool(torch.isfinite(value).all()):
        raise BadArgument("latents: hold NaN or infinity")
    return value.detach().to(torch.float32, copy=True)


def levels(value: Any) -> list[float]:
    """Return the caller's noise levels as floats; the scheduler checks their order and range."""
    try:
        return [float(level) for level in value]
    except (TypeError, ValueError, OverflowError):
        raise BadArgument(f"sigmas: got {shown(value)}, wanted a list of falling numbers in (0, 1]") from None


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return one of the allowed values."""
    if not isinstance(value, str) or value not in allowed:
        raise BadArgument(f"{name}: got {shown(value)}, wanted one of {', '.join(allowed)}")
    return value


def named(name: str, value: Any, default: str, allowed: Sequence[str]) -> str:
    """Return one of the allowed values; None stands for the default."""
    return default if value is None else choice(name, value, allowed)


def callback(function: Any, names: Any) -> tuple[str, ...]:
    """Check the step callback and return the names of the tensors that it asks for."""
    if function is not None and not callable(function):
        raise BadArgument(f"callback_on_step_end: got {shown(function)}, wanted a function or None")
    if not isinstance(names, (list, tuple)) or any(name not in CALLBACK_TENSORS for name in names):
        raise BadArgument(
            f"callback_on_step_end_tensor_inputs: got {shown(names)}, "
            f"wanted a list of {', '.join(CALLBACK_TENSORS)}"
        )
    return tuple(names)


def guidance(guidance_scale: Any, cfg: Any, default: float) -> float:
    """Return the guidance scale in the convention where 0 is off; `cfg` has the one where 1 is off."""
    if cfg is None:
        return default if guidance_scale is None else real("guidance_scale", guidance_scale, 0, MAX_GUIDANCE)
    if guidance_scale is not None:
        raise BadArgument(
            "guidance_scale and cfg are two names of one number (guidance_scale = cfg - 1): give one"
        )
    return real("cfg", cfg, 1, MAX_GUIDANCE + 1) - 1


def seed(value: Any, generator: Any) -> int | None:
    """Return a seed or None; a seed and a generator exclude each other."""
    if value is None:
        return None
    if generator is not None:
        raise BadArgument("seed and generator both choose the noise: give one")
    return whole("seed", value, 0, MAX_SEED)


def read_path(name: str, path: Any) -> str | os.PathLike[str]:
    """Return a path as it was given; whether the file exists is checked by its reader.

    Raises:
        BadArgument: The value is not text or a path, or is empty.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise BadArgument(f"{name}: got {shown(path)}, wanted the path of a file or folder")
    if not os.fspath(path):
        raise BadArgument(f"{name}: the path is empty")
    return path


def read_device(device: str | torch.device) -> torch.device:
    """Return a device that this machine has; "auto" is the first GPU if torch can use it, else the CPU.

    Raises:
        BadArgument: The value is no name of a device.
        Unsupported: This machine, or this build of torch, has no such device.
    """
    if device == "auto":
        return torch.device("cuda:0" if _computes("cuda:0") else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise BadArgument(
            f"device: got {printable(device, 60)!r}, wanted 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from None
    if where.type not in ("cpu", "cuda"):
        raise Unsupported(f"device: {where.type} is not supported; use device='cpu' or device='cuda'")
    count = torch.cuda.device_count() if where.type == "cuda" and torch.cuda.is_available() else 0
    if where.type == "cuda" and count == 0:
        raise Unsupported("device: this machine has no GPU that torch can use; use device='cpu'")
    if where.type == "cuda" and (where.index or 0) >= count:
        raise Unsupported(f"device: there is no {where}, this machine has {count} GPUs, counted from 0")
    return where


def _computes(device: str) -> bool:
    """Whether torch can compute on a GPU: it is there, this build has kernels for it, and memory is left."""
    try:
        return torch.cuda.is_available() and float(torch.ones(1, device=device) + 1) == 2
    except RuntimeError:
        return False


Dtype = torch.dtype | str | Mapping[str, "torch.dtype | str"] | None
"""Argument for the dtype of a pipeline: one for all networks, or component -> dtype as in diffusers."""


Compute = str | Mapping[str, str] | None
"""Argument for the arithmetic of a pipeline's products, in the same forms; see `quant.arithmetic`."""


def read_dtypes(dtype: Dtype, torch_dtype: Dtype, device: torch.device) -> dict[str, torch.dtype]:
    """Return the dtypes of "transformer", "text_encoder" and "siglip" from the two arguments that name them.

    Raises:
        BadArgument: `read_dtype` refuses a value, or a dict names something else.
        Unsupported: A dict asks for a VAE that is not float32.
    """
    named: list[Mapping[str, Any]] = [
        value if isinstance(value, Mapping) else {"default": value} for value in (dtype, torch_dtype)
    ]
    known = ("transformer", "text_encoder", "siglip", "vae", "default")
    for key in (key for value in named for key in value if key not in known):
        raise BadArgument(f"dtype: got a dict with {shown(key)}, wanted keys of {', '.join(known)}")
    for value in named:
        if value.get("vae") is not None and read_dtype(value["vae"], None, device) != torch.float32:
            raise Unsupported("dtype: the VAE is always computed in float32; leave it out of the dict")
    found = {}
    for name in known[:3]:
        first, second = (value.get(name, value.get("default")) for value in named)
        found[name] = read_dtype(first, second, device)
    return found


def read_computes(compute: Compute) -> dict[str, str]:
    """Return the modes of "transformer" and "text_encoder"; one that is left out is no key.

    Raises:
        BadArgument: A value is no mode, or a dict names something else.
    """
    named = compute if isinstance(compute, Mapping) else {"default": compute}
    known = ("transformer", "text_encoder", "default")
    for key, value in named.items():
        if key not in known:
            raise BadArgument(f"compute: got a dict with {shown(key)}, wanted keys of {', '.join(known)}")
        if value is not None:
            choice("compute", value, MODES)
    found = {name: named.get(name, named.get("default")) for name in known[:2]}
    return {name: mode for name, mode in found.items() if mode is not None}


def read_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None, device: torch.device
) -> torch.dtype:
    """Return the dtype of the computation from the two arguments that may name it.

    The default is float32 on a CPU, float16 on GPUs before Ampere (they only emulate bfloat16), else
    bfloat16.

    Raises:
        BadArgument: A value is not one of float32, float16, bfloat16, or the two differ.
    """
    chosen = []
    for value in (dtype, torch_dtype):
        if value is not None:
            kind = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
            if kind is None or kind not in DTYPES.values():
                raise BadArgument(f"dtype: got {printable(value, 60)}, wanted one of {', '.join(DTYPES)}")
            chosen.append(kind)
    if len(set(chosen)) > 1:
        raise BadArgument(
            f"dtype and torch_dtype are one argument, got {chosen[0]} and {chosen[1]}: give one"
        )
    if chosen:
        return chosen[0]
    if device.type == "cpu":
        return torch.float32
    seen = device.type == "cuda" and torch.cuda.is_available()
    emulated = seen and torch.cuda.get_device_capability(device)[0] < 8
    return torch.float16 if emulated else torch.bfloat16


def free_name(stem: str, taken: Collection[str]) -> str:
    """The stem, or the first of stem-2, stem-3 ... that is not taken."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
