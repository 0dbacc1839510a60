"""The stream of an Omni run as the denoiser calls it: pieces of captions, references, and the noisy image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import Unsupported
from zimage_core.models.omni import OmniPrepared, OmniTransformer
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.layers import has_hooks
from zimage_core.omni.references import References


class OmniStream:
    """`prepare` and `step` of a transformer that sees reference images.

    Args:
        transformer: The network.
        references: The reference images of each image of the run, encoded.
    """

    def __init__(self, transformer: ZImageTransformer, references: References) -> None:
        transformer = getattr(transformer, "_orig_mod", transformer)  # torch.compile's is not its steps
        if not isinstance(transformer, OmniTransformer):
            raise Unsupported("reference_images: this transformer takes text alone; load an Omni checkpoint")
        self.transformer, self.positions = transformer, references.positions
        self._images = len(references.pictures)
        self._captions: Sequence[Sequence[Tensor]] = ()
        self._of = [references.of(image) for image in range(self._images)]

    def prepare(
        self, captions: Sequence[Sequence[Tensor]], times: Sequence[float], size: tuple[int, int]
    ) -> OmniPrepared:
        """Compute what the steps of a run share.

        Args:
            captions: Pieces [L, cap_feat_dim] of each image's caption, then those of the negative side.
            times: Network times of the steps.
            size: Height and width of the latents.
        """
        self._captions = captions
        members = [self._of[i % self._images] for i in range(len(captions))]
        return self.transformer.prepare_omni(captions, members, times, size, self.positions)

    def step(self, latent: Tensor, prepared: OmniPrepared, i: int, caption: int, *_: Any) -> Tensor:
        """Estimate (clean - noise) [C, h, w] of a latent [C, h, w] in step i, with one of the captions."""
        if has_hooks(self.transformer):  # they see the network's own call, which prepares each step anew
            return self._whole(latent, prepared, i, caption)
        return self.transformer.step_omni(latent, prepared, i, caption)

    def _whole(self, latent: Tensor, prepared: OmniPrepared, i: int, caption: int) -> Tensor:
        members = self._of[caption % self._images]
        images = [None if each.latent is None else each.latent[:, None] for each in members]
        out = self.transformer(
            [[*images, latent[:, None]]],
            torch.tensor([prepared.times[i]], dtype=torch.float32),
            [self._captions[caption]],
            siglip_feats=[[*(each.features for each in members), None]] if members else None,
            positions=self.positions,
        )[0]
        estimate: Tensor = out[:, 0]
        return estimate
