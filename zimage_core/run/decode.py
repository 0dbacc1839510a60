"""Runs the VAE: latents to pixels, and back; in smaller tiles if the memory of a GPU is too small."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zimage_core.config import MIN_TILE
from zimage_core.errors import OutOfMemory
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.run.nonfinite import checked


@dataclass(frozen=True)
class DecodeWay:
    """How an image is decoded: the arguments `tile` and `keep` of `Autoencoder.decode`."""

    tile: int | None = None
    keep: torch.device | None = None


def ways_to_decode(h: int, w: int, tile: int | None) -> list[DecodeWay]:
    """Ways to decode latents [h, w], in order of falling memory use.

    The first uses the autoencoder's attribute `tile`; the next ones use tiles that halve in size down to
    `MIN_TILE`; the last also keeps the maps of the whole image on the CPU.
    """
    start = max(h, w) if tile is None else min(tile, max(h, w))
    sizes = [size for size in (2**n for n in range(20, 0, -1)) if MIN_TILE <= size < start]
    last = DecodeWay(min(start, MIN_TILE), torch.device("cpu"))
    return [DecodeWay(), *map(DecodeWay, sizes), last]


def decode(
    vae: Autoencoder,
    latents: torch.Tensor,
    debug: bool = False,
    keep: torch.device | None = None,
    ranks: Any = None,
) -> torch.Tensor:
    """Latents [B, C, h, w] -> pixels [B, 3, 8 h, 8 w] float32 about [-1, 1] on the CPU; one image at a time.

    If the memory of a GPU is too small, smaller and smaller tiles are tried, then whole maps on the CPU. The
    images are the same up to rounding.

    Args:
        vae: The decoder's network.
        latents: Latents of the transformer, scaled and shifted.
        debug: Check every block.
        keep: Device of the maps of the whole image, as planned for a memory budget; no other way is then
            tried.
        ranks: The `parallel.ranks.Ranks` that may share an image; those that do try no other way either.

    Raises:
        OutOfMemory: Not even the smallest tiles fit; the error has the latents.
        NonFinite: NaN or infinity; the message names the block and the tensor.
    """
    config = vae.config
    size = _size(vae, *latents.shape[2:])

    def failed(reason: str) -> OutOfMemory:
        return OutOfMemory(
            f"VAE: no memory to decode {size}, not even in the smallest tiles ({reason}); the "
            "finished latents are in the attribute `latents` of this error: save them, then free "
            "memory or call pipe.vae.to('cpu'), and pipe.vae.decode(error.latents / "
            "pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor) gives pixels in [-1, 1]",
            latents.cpu(),
        )

    strip = None if ranks is None else ranks.strip(*latents.shape[2:], vae.tile)

    share = {} if strip is None else {"strip": strip}

    def one(z: torch.Tensor, way: DecodeWay) -> torch.Tensor:
        image = checked(vae, "VAE", partial(vae.decode, z, way.tile, way.keep, **share), debug)
        return image.cpu()  # finished images would split the memory that the next one needs

    left = [z[None] for z in latents / config.scaling_factor + config.shift_factor]
    if strip is not None and keep is None:
        keep = vae.device  # ranks that chose smaller tiles one by one would wait for each other
    return torch.cat(_each(vae, one, left, latents.shape[2:], keep, f"decode {size}", failed, 7))


def encode_images(
    vae: Autoencoder, pixels: torch.Tensor, debug: bool = False, keep: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [B, 3, H, W] in [-1, 1] -> mean and log-variance [B, C, H / 8, W / 8] on the CPU, one by one.

    Memory is treated as in `decode`, and no image takes more than its decoding.

    Args:
        vae: The encoder's network.
        pixels: Images on the CPU.
        debug: Check every block.
        keep: Device of the maps of the whole image, as planned for a memory budget.

    Raises:
        OutOfMemory: Not even the smallest tiles fit.
        NonFinite: NaN or infinity; the message names the block and the tensor.
    """
    device, factor = vae.encoder.conv_in.weight.device, vae.config.spatial_factor
    h, w = (side // factor for side in pixels.shape[2:])
    size = _size(vae, h, w)

    def failed(reason: str) -> OutOfMemory:
        return OutOfMemory(
            f"VAE: no memory to encode {size}, not even in the smallest tiles ({reason}); free memory, set a "
            "budget with pipe.limit_memory, or give height= and width= for a smaller image"
        )

    def one(x: torch.Tensor, way: DecodeWay) -> torch.Tensor:
        call = partial(_moments, vae, x.to(device), way)
        return checked(vae, "VAE", call, debug).cpu()

    found = _each(vae, one, [x[None] for x in pixels], (h, w), keep, f"encode {size}", failed, 8)
    mean, logvar = torch.cat(found).chunk(2, dim=1)
    return mean, logvar


def _moments(vae: Autoencoder, x: torch.Tensor, way: DecodeWay) -> torch.Tensor:
    return torch.cat(vae.moments(x, way.tile, way.keep), dim=1)


def _size(vae: Autoencoder, h: int, w: int) -> str:
    return f"an image of {vae.config.spatial_factor * w} x {vae.config.spatial_factor * h}"


def _each(
    vae: Autoencoder,
    one: Callable[[torch.Tensor, DecodeWay], torch.Tensor],
    left: list[torch.Tensor],
    latent_size: Sequence[int],
    keep: torch.device | None,
    what: str,
    failed: Callable[[str], OutOfMemory],
    caller: int,
) -> list[torch.Tensor]:
    """Run each image in the first way that fits in memory; images begin where the last one succeeded.

    `caller` is the number of frames from here to the user's call, for the warning.
    """
    h, w = latent_size
    ways = ways_to_decode(h, w, vae.tile) if keep is None else [DecodeWay(vae.tile, keep)]
    done: list[torch.Tensor] = []
    while left:
        try:
            done.append(one(left[0], ways[0]))
            del left[0]
            continue
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        # outside the handler, because the exception keeps the frames that hold the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(ways) == 1:
            raise failed(reason)
        if ways[0] == DecodeWay():  # warn only after the first attempt
            warnings.warn(
                f"VAE: no memory to {what} with tile = {vae.tile}; it is {what.split()[0]}d again in "
                "smaller tiles, which takes longer and changes no more than rounding; "
                "pipe.enable_vae_tiling() before the run saves the failed attempt",
                stacklevel=caller,
            )
        del ways[0]
    return done
