"""The result of a run: images, settings and timings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from zimage_core import __version__
from zimage_core.errors import BadArgument
from zimage_core.files import png
from zimage_core.files.atomic import write_atomically
from zimage_core.run.batch import Encoding
from zimage_core.run.loras import settings_of_adapters
from zimage_core.run.request import Run

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from zimage_core.memory.phases import MemoryReport
    from zimage_core.weights.opened import Opened


OTHER_KINDS = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl")
"""Endings of other kinds of images; any other text after a dot may be part of a name."""
MOST_SIGMAS = 100
"""Most of the caller's own noise levels that are kept in an image's settings; a longer list is left out."""


@dataclass(frozen=True)
class Timings:
    """Wall-clock times in seconds.

    Args:
        encode: Time to encode the prompts.
        steps: Time of each denoising step, without the caller's callback.
        decode: Time to decode the latents.
        total: Time of the whole call, including callbacks.
    """

    encode: float
    steps: tuple[float, ...]
    decode: float
    total: float


class Clock:
    """Stopwatch for the stages of a run."""

    def __init__(self) -> None:
        self._start = self._mark = perf_counter()
        self._steps: list[float] = []

    def lap(self) -> float:
        """Seconds since the last call, or since the start; begins a new interval."""
        now = perf_counter()
        passed, self._mark = now - self._mark, now
        return passed

    def step(self) -> None:
        """Record the end of a denoising step."""
        self._steps.append(self.lap())

    def steps(self) -> tuple[float, ...]:
        """Seconds of each step; begins a new interval, so that the next stage is timed from here."""
        self.lap()
        return tuple(self._steps)

    def total(self) -> float:
        """Seconds since the clock was made."""
        return perf_counter() - self._start


@dataclass(frozen=True)
class ZImageResult:
    """The images of a run and how they were made; `.images` and `[0]` are those of diffusers.

    Args:
        images: PIL images, [B, H, W, 3] float32 NumPy, [B, 3, H, W] float32 torch, or latents [B, 16, h, w]
            float32, depending on `output_type`.
        seeds: Seed of each image; None if the noise came from a generator or from given latents.
        sigmas: Noise levels of the run, one more than steps.
        timings: Seconds per stage.
        peak_memory: Highest resident memory of the process so far in bytes, including earlier runs; on a GPU
            the highest allocation there. 0 if the system does not report it.
        settings: Prompt, steps, guidance and so on of each image, as written into a PNG.
        interrupted: Whether the callback stopped the run, so that the images are unfinished.
        memory: With a memory budget, the plan of the run and what was streamed; else None.
        files: Component -> name, size and hash of its file; see `WeightFile.identity`.
        opened: Component -> that file. It stays open for as long as the result lives.
    """

    images: list[Image] | np.ndarray[Any, Any] | torch.Tensor
    seeds: tuple[int | None, ...]
    sigmas: tuple[float, ...]
    timings: Timings
    peak_memory: int
    settings: tuple[dict[str, Any], ...]
    interrupted: bool = False
    memory: MemoryReport | None = None
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    opened: Mapping[str, Opened | None] = field(default_factory=dict, repr=False)

    @property
    def seed(self) -> int | None:
        """Seed of the first image."""
        return self.seeds[0]

    def __getitem__(self, index: int | str) -> Any:
        """Item of `(images,)`, or `["images"]`, so that code that unpacks diffusers' output works."""
        if isinstance(index, str):
            return {"images": self.images}[index]
        return (self.images,)[index]

    def metadata(self, index: int = 0, full_hash: bool = False) -> dict[str, Any]:
        """Settings and file hashes of image `index`, as in the `zimage` chunk of its PNG.

        Args:
            index: Number of the image.
            full_hash: Hash whole files, whatever their size; see `WeightFile.identity`.

        Raises:
            BadFile: A model file was changed since it was opened (only with `full_hash`).
        """
        hashes = dict(self.files)
        if full_hash:
            hashes |= {name: each.file.identity(full=True) for name, each in self.opened.items() if each}
        return {**self.settings[index], "files": hashes}

    def save(
        self,
        path: str | os.PathLike[str],
        index: int = 0,
        force: bool = False,
        metadata: bool = True,
        full_hash: bool = False,
    ) -> None:
        """Write image `index` as a complete PNG, or nothing.

        `images[index].save(path)` is Pillow's own: it writes other kinds of files, and no settings.

        Args:
            path: Destination; a name with an ending ends in .png.
            index: Number of the image.
            force: Replace an existing file.
            metadata: Write prompt, seed, settings and file hashes into it (never a path).
            full_hash: Hash whole files, whatever their size.

        Raises:
            BadArgument: The images are arrays or latents, there is no such image, or the name has the ending
                of another kind of file.
            BadFile: The file exists and `force` is not set, or it cannot be written.
        """
        if not isinstance(self.images, list):
            raise BadArgument("save: this run gave arrays or latents; ask for output_type='pil'")
        if not -len(self.images) <= index < len(self.images):
            raise BadArgument(f"save: there is no image {index}, the run made {len(self.images)}")
        suffix = Path(path).suffix
        if suffix.lower() in OTHER_KINDS:
            raise BadArgument(
                f"save: images are written as PNG, which holds their settings, not as {suffix}; use a name "
                "ending in .png, or result.images[0].save(...), which loses the settings"
            )
        data = png.encode(self.images[index], self.metadata(index, full_hash) if metadata else None)
        write_atomically(path, data, overwrite=force)


def settings_of(
    run: Run, dtype: torch.dtype, networks: Mapping[str, Any], ranks: Any = None
) -> tuple[dict[str, Any], ...]:
    """Settings of each image for its PNG; nothing in them differs between equal runs, as times would."""
    common: dict[str, Any] = {
        "program": "zimage_core",
        "version": f"zimage_core {__version__}",
        "steps": run.steps,
        "sampler": run.sampler,
        "shift": run.shift,
        "guidance_scale": run.guidance_scale,
        "width": run.width,
        "height": run.height,
        "dtype": str(dtype).removeprefix("torch."),
        "compute": networks["transformer"].compute,
    }
    if loras := settings_of_adapters(networks):
        common["loras"] = loras
    encoder = networks.get("text_encoder")
    if encoder is not None and encoder.compute != common["compute"]:
        common["text_encoder_compute"] = encoder.compute
    if ranks is not None:
        common |= ranks.settings
    if run.guidance_scale > 0:
        common |= {"cfg_normalization": run.cfg_normalization, "cfg_truncation": run.cfg_truncation}
    if run.own_sigmas and run.steps <= MOST_SIGMAS:
        common["sigmas"] = [round(s, 6) for s in run.sigmas]
    if run.schedule != "linear":
        common["schedule"] = run.schedule
    if run.variety:
        common["variety"] = run.variety
    if run.controls:
        common["controls"] = [dict(each.settings) for each in run.controls]
    usual = Encoding()._asdict()
    common |= {name: value for name, value in run.encoding._asdict().items() if value != usual[name]}
    out, batch = [], run.batch
    for i, seed in enumerate(run.seeds):
        # if features were given, the prompt was not used, so it is left out
        texts: dict[str, Any] = {}
        if batch.prompts and not batch.prompt_embeds:
            texts = {"prompt": str(batch.prompts[i]), **getattr(batch.prompts[i], "settings", {})}
        if batch.negative_prompts and batch.negative_prompts[i]:
            texts["negative_prompt"] = batch.negative_prompts[i]
        edited = {} if run.edit is None else run.edit.settings(i)
        shown = {} if run.references is None else run.references.settings(i)
        out.append({**texts, "seed": seed, **common, **edited, **shown})
    return tuple(out)


def to_output(
    pixels: torch.Tensor, output_type: str, edit: Any = None
) -> list[Image] | np.ndarray[Any, Any] | torch.Tensor:
    """Decoder output [B, 3, H, W] about [-1, 1] -> `output_type`: arrays in [0, 1], or 8-bit images.

    8-bit values are rounded to nearest, as in diffusers' image processor. `edit` pastes what stays of a given
    image.
    """
    pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()
    if edit is not None:
        pixels = edit.finished(pixels)
    if output_type == "pt":
        return pixels
    arrays: np.ndarray[Any, Any] = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    if output_type == "np":
        return arrays
    from PIL import Image as pillow

    return [pillow.fromarray((array * 255).round().astype("uint8")) for array in arrays]


def peak_memory(device: torch.device) -> int:
    """Highest memory use in bytes, of the GPU if `device` is one, else of the process; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
