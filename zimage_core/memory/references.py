"""What reference images add to a plan: a longer stream, and images that the VAE encodes."""

from __future__ import annotations

from dataclasses import dataclass

from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.errors import BadArgument
from zimage_core.memory.activations import FLOAT32, ITEMSIZE, image_tokens, padded
from zimage_core.memory.sizes import Sizes

PIECE = 2
"""Tokens of a piece between two references."""
FEATURES = 256
"""Vision tokens of an image, at most, as SigLIP2's processor makes them."""


@dataclass(frozen=True)
class References:
    """The reference images of a run; of several images of a run, those with the most tokens count.

    Args:
        sizes: Height and width in latents of each reference.
        features: Vision tokens of each.
        pieces: Tokens of each piece of the caption.
        samples: Streams that differ: images of the run, twice with guidance.
        kept: Latents and vision tokens of all pictures of the run that differ.
    """

    sizes: tuple[tuple[int, int], ...]
    features: tuple[int, ...]
    pieces: tuple[int, ...]
    samples: int = 1
    kept: tuple[int, int] = (0, 0)

    @classmethod
    def usual(cls, count: int, rows: int, cols: int, caption: int, samples: int) -> References:
        """References as large as the image that is made, for a plan before there are any."""
        pieces = (caption, *[PIECE] * (count + 1)) if count else (caption,)
        kept = count * rows * cols, count * FEATURES
        return cls(((rows, cols),) * count, (FEATURES,) * count, pieces, samples, kept)

    def seen(self, sizes: Sizes, width: int, height: int) -> tuple[int, int, int]:
        """Width and height in pixels and caption of a run without references that has as many tokens."""
        net, vae = sizes.transformer.config, sizes.vae.config
        if not isinstance(net, TransformerConfig) or not isinstance(vae, AutoencoderConfig):
            raise BadArgument("plan: the parts are not those of a Z-Image pipeline")
        factor = vae.spatial_factor
        rows, cols, caption = self.stream(net, height // factor, width // factor)
        return cols * factor, rows * factor, caption

    def images(self, config: TransformerConfig) -> int:
        """Tokens of the references' latents."""
        return sum(padded(image_tokens(config, *size)) for size in self.sizes)

    def rest(self) -> int:
        """Tokens of the caption's pieces and of the vision features; the target's features are pads."""
        features = sum(map(padded, (*self.features, 1))) if self.features else 0
        return sum(map(padded, self.pieces)) + features

    def stream(self, config: TransformerConfig, rows: int, cols: int) -> tuple[int, int, int]:
        """Height, width and caption of a run without references that has as many tokens.

        Args:
            config: Config of the transformer.
            rows: Height of the image in latents.
            cols: Width of the image in latents.
        """
        tokens = padded(image_tokens(config, rows, cols)) + self.images(config)
        return tokens * config.patch_size, config.patch_size, self.rest()

    def beside(self, config: TransformerConfig, rows: int, cols: int, dtype: str) -> int:
        """Bytes that live through the steps beside those of a run without references, see `stream`."""
        item, target = ITEMSIZE[dtype], padded(image_tokens(config, rows, cols))
        images, rest = self.images(config), self.rest()
        rotations = (2 * (target + images) + rest) * config.head_dim * FLOAT32
        own = item * config.dim * (images + rest) + rotations
        given = self.kept[0] * config.in_channels + self.kept[1] * (config.siglip_feat_dim or 0)
        # norms are made part by part, and where the first was, a gap stays
        gap = item * config.dim * target if self.sizes else 0
        # given ones are kept as they were encoded, and in the dtype of the transformer
        return self.samples * own + gap + given * (FLOAT32 + item)
