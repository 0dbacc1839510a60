"""Runs with reference images: the methods of `ZImagePipeline` that encode them.

The work is done in `omni/` and `vision/`, which are imported when a call gives references.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from math import prod
from typing import TYPE_CHECKING

import torch

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.memory.references import References as Planned
from zimage_core.run.checks import whole
from zimage_core.run.components import check_components
from zimage_core.run.decode import encode_images
from zimage_core.run.nonfinite import checked
from zimage_core.run.references import LACKS, MOST
from zimage_core.run.request import Request, Run

if TYPE_CHECKING:
    from zimage_core.models.autoencoder import Autoencoder
    from zimage_core.models.transformer import ZImageTransformer
    from zimage_core.models.vision_tower import VisionTower
    from zimage_core.run.placement import Placement

EDITING = ("strength", "mask_image", "outpaint")
"""Arguments with which `image` is an image to begin from, and no reference."""
_SEES = {
    "vae": "VAE to encode them; give vae=",
    "siglip": "vision tower to see them; give siglip=, a SigLIP2 vision model as in the folder siglip/ of an "
    "Omni checkpoint",
}


class Referenced:
    """The methods of `ZImagePipeline` for reference images."""

    transformer: ZImageTransformer
    vae: Autoencoder
    siglip: VisionTower | None
    _placement: Placement

    def _with_own_references(self, request: Request) -> Request:
        """The request, where `image` means a reference if the pipeline has a vision tower."""
        image = request.image
        if self.siglip is None or image is None or (isinstance(image, (list, tuple)) and not image):
            return request
        if any(getattr(request, name) is not None for name in (*EDITING, "reference_images")):
            return request
        return replace(request, reference_images=image, image=None)

    def _check_references(self, run: Run) -> None:
        """Refuse a run with references that lacks a component, before any weight is used."""
        if run.references is None or not any(run.references.pictures):
            return
        for name, network in {"vae": self.vae, "siglip": self.siglip}.items():
            if network is None:
                raise Unsupported(f"reference_images: this pipeline has no {_SEES[name]}")
        check_components(self, {})  # a component may have been replaced since the pipeline was built

    def _usual_references(
        self, count: int, width: int, height: int, caption_tokens: int, samples: int
    ) -> Planned | None:
        """So many references as a plan expects them; None for none."""
        whole("references", count, 0, MOST)
        if not count:
            return None
        if self.transformer.config.siglip_feat_dim is None:
            raise BadArgument(f"references: the transformer takes text alone, {LACKS}; leave them out")
        factor = self.vae.config.spatial_factor
        return Planned.usual(count, height // factor, width // factor, caption_tokens, samples)

    def _planned_references(self, run: Run, ids: Mapping[str, torch.Tensor]) -> Planned | None:
        """The references of a run as its memory is planned; `ids` are those of all its texts.

        Raises:
            BadArgument: Texts and images take more positions than the transformer knows.
        """
        if run.references is None:
            return None
        from zimage_core.models.omni_sequence import check_positions, positions_of

        lengths = {text: torch.empty(len(each), 0) for text, each in ids.items()}
        captions = [*chain(*run.batch.sides(lengths, run.encoding, torch.device("cpu")))]
        config, factor = self.transformer.config, self.vae.config.spatial_factor if self.vae else 8
        sizes = {id(each): tuple(side // factor for side in each.size) for each in run.references.different()}
        tokens: dict[int, int] = {}
        if sizes and self.siglip is not None:
            from zimage_core.vision.processor import processor_of

            grid = processor_of(self.siglip).grid
            for each in run.references.different():
                tokens[id(each)] = prod(grid(each.image.height, each.image.width))
        kept = sum(map(prod, sizes.values())), sum(tokens.values())
        members = []
        for i, caption in enumerate(captions):
            shown = [id(each) for each in run.references.pictures[i % run.batch.images]]
            pieces = tuple(map(len, caption))
            # the places of images alone: their sides were checked as they were opened
            places = positions_of(pieces, [None] * (len(shown) + 1), (), 1, run.references.positions)
            check_positions(config, places, sum(pieces))
            seen = tuple(sizes[each] for each in shown), tuple(tokens[each] for each in shown)
            members.append(Planned(*seen, pieces, len(captions), kept))
        return max(members, key=lambda each: each.images(config) + each.rest())

    def _with_encoded_references(self, run: Run) -> Run:
        """The run with the latents and the vision features of its references."""
        if self.siglip is None or not any(run.references.pictures):
            return run
        from zimage_core.vision.processor import encode, processor_of

        config, memory = self.vae.config, self._placement.memory
        keep = None if memory is None else memory.keep
        # under a budget a tensor that stays on the device would keep the whole memory of the phase there
        out = self.transformer.device if memory is None else torch.device("cpu")
        with self._placement.phase("image", self.vae):
            moments = partial(encode_images, self.vae, debug=run.debug, keep=keep)
            found = run.references.with_latents(moments, config.scaling_factor, config.shift_factor)
        tower, processor = self.siglip, processor_of(self.siglip)

        def seen(pixels: torch.Tensor) -> torch.Tensor:
            call = partial(encode, tower, pixels, processor)
            return checked(tower, "vision tower", call, run.debug).to(out)

        with self._placement.phase("vision", tower):
            return replace(run, references=found.with_features(seen))
