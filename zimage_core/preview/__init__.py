"""Quick looks at latents: a linear map to RGB that needs no file, and TAEF1, a tiny decoder."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zimage_core.config import AutoencoderConfig
from zimage_core.errors import BadShape, Unsupported
from zimage_core.preview import latent_rgb
from zimage_core.preview.taef1 import CHANNELS, load
from zimage_core.run.components import require
from zimage_core.run.result import to_output

if TYPE_CHECKING:
    from PIL.Image import Image


class Preview:
    """Turns latents of a run, finished or not, into a small or quick image.

        look = Preview(pipe)

        def callback(pipe, step, timestep, tensors):
            look(tensors["denoised"]).save("preview.png")

        pipe("a red circle", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["denoised"])

    Without a file each latent becomes one colour by a linear map: for FLUX.1's VAE the published one, for any
    other VAE one that is fitted to it here. With TAEF1 the image is nearly that of FLUX.1's VAE.

    Args:
        pipe: The pipeline whose latents these are.
        taef1: A safetensors file of TAEF1; without it the linear map is used.

    Raises:
        BadFile, WrongModel: The file cannot be read, or is not TAEF1.
        Unsupported: TAEF1 does not know these latents, or there is no VAE to fit the map to.
    """

    def __init__(self, pipe: Any, taef1: str | PathLike[str] | None = None) -> None:
        require("transformer", pipe.transformer)
        config = None if pipe.vae is None else pipe.vae.config
        flux = latent_rgb.is_flux(config)
        self._factor = (config or AutoencoderConfig()).spatial_factor
        self._channels: int = pipe.transformer.config.in_channels
        self._decoder = None
        if taef1 is not None:
            if not flux or self._channels != CHANNELS:
                raise Unsupported("taef1: it decodes latents of FLUX.1's VAE, and this model has another VAE")
            self._decoder = load(taef1).to(pipe.device)
        elif flux and self._channels == CHANNELS:
            self._map = latent_rgb.published()
        elif config is not None:
            self._map = latent_rgb.fitted(pipe.vae)
        else:
            raise Unsupported(f"preview: latents of {self._channels} channels without a VAE show no colours")

    def __call__(self, latents: Tensor, index: int = 0) -> Image:
        """Latents of the transformer [B, C, h, w], or one image's [C, h, w] -> an image of the run's size.

        Args:
            latents: Latents, such as the callback's "denoised" or those of output_type="latent".
            index: Which image of the batch.

        Raises:
            BadShape: The latents have another shape.
        """
        if latents.ndim not in (3, 4) or latents.shape[-3] != self._channels:
            raise BadShape(f"preview: got {tuple(latents.shape)}, wanted latents [B, {self._channels}, h, w]")
        z = latents.reshape(-1, *latents.shape[-3:])[index].float()
        if self._decoder is not None:
            pixels = self._decoder(z[None].to(self._decoder.device))
        else:
            pixels = self._map(z[None])
        image: Image = to_output(pixels, "pil")[0]  # type: ignore[assignment]
        size = (self._factor * z.shape[-1], self._factor * z.shape[-2])
        return image if image.size == size else image.resize(size)
