"""Sizes of a ControlNet, found from its tensors, and the layers of the base model that it steers.

The files are those of VideoX-Fun's trainer ("Fun-Controlnet-Union"); docs/guides/control.md lists the
variants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from zimage_core.config import TransformerConfig
from zimage_core.errors import BadWeights, printable
from zimage_core.weights import infer
from zimage_core.weights.controlnets import (
    EMBEDDER,
    LAYERS,
    OWN,
    PATCH,
    PLAIN,
    REFINER,
    SHARED,
    refiner_kind,
    variant_of,
)
from zimage_core.weights.infer import Shape


@dataclass(frozen=True)
class ControlConfig:
    """Sizes of a ControlNet.

    Args:
        dim: Width of the token stream, that of the base model.
        n_heads: Attention heads.
        hidden_dim: Inner width of the SwiGLU.
        channels: Channels of the control latents: those of a latent, or twice as many and one (33), where a
            mask and the latents of an image to be inpainted may follow.
        n_layers: Control blocks over the joint sequence.
        n_refiner_layers: Blocks over the control tokens alone; 0 where the control layers serve (2.0).
        refiner: `PLAIN`, `OWN` or `SHARED`; `weights.controlnets` says what they mean.
        places: Layers of the base model after which hints are added; None to space them evenly.
    """

    dim: int
    n_heads: int
    hidden_dim: int
    channels: int
    n_layers: int
    n_refiner_layers: int
    refiner: str = PLAIN
    places: tuple[int, ...] | None = None

    @property
    def blocks(self) -> TransformerConfig:
        """Config of its blocks, which are blocks of the S3-DiT; positions are the base model's."""
        return TransformerConfig(
            dim=self.dim,
            n_layers=self.n_layers,
            n_refiner_layers=self.n_refiner_layers,
            n_heads=self.n_heads,
            hidden_dim=self.hidden_dim,
            in_channels=self.channels,
            patch_size=PATCH,
            axes_dims=(self.dim // self.n_heads, 0, 0),
        )

    @property
    def masked(self) -> bool:
        """Whether the control latents may have a mask and the latents of an image to be inpainted."""
        return self.channels % 2 == 1

    @property
    def steers_refiner(self) -> bool:
        """Whether its refiner is made of control blocks, which have projections."""
        return self.refiner == OWN

    @property
    def variant(self) -> str:
        """Name of the variant: "1.0", "2.0", "2.1", with "lite" for few layers."""
        return variant_of(self.refiner, self.n_layers)

    def places_in(self, n_layers: int) -> tuple[int, ...]:
        """Layers of a base model with `n_layers` layers after which hints are added, one for each block.

        Raises:
            BadWeights: The base model has fewer layers, or the places that the file states lie outside.
        """
        found = self.places
        if found is None:
            found = tuple(n_layers // self.n_layers * i for i in range(self.n_layers))
        if self.n_layers > n_layers or not all(0 <= place < n_layers for place in found):
            raise BadWeights(
                f"this ControlNet steers {self.n_layers} layers{f' ({list(found)})' if self.places else ''}, "
                f"the transformer has {n_layers}; get the ControlNet that was made for this transformer"
            )
        return found


def control_config(
    shapes: Mapping[str, Shape], metadata: Mapping[str, Any], untrained: Callable[[str], bool]
) -> ControlConfig:
    """Sizes of a ControlNet from the shapes of its tensors.

    Args:
        shapes: Tensor name without prefix -> shape.
        metadata: Metadata of the file; its key `places` is read, such as "0,10,20". Of a 1.0 that states it,
            the trainer is another, and the refiner may be missing.
        untrained: Whether a tensor holds one and the same number, by its name without prefix.

    Raises:
        BadWeights: A tensor that decides the size is missing, or sizes contradict each other.
    """
    dim, width = infer.axes(shapes, f"{EMBEDDER}.weight", 2)
    if width % PATCH**2:
        raise BadWeights(
            f"'{EMBEDDER}.weight' reads {width} numbers a patch, wanted a multiple of {PATCH**2}"
        )
    hidden, _ = infer.axes(shapes, f"{LAYERS}.0.feed_forward.w1.weight", 2)
    norm = next((n for n in ("norm_q", "q_norm") if f"{LAYERS}.0.attention.{n}.weight" in shapes), "norm_q")
    (head_dim,) = infer.axes(shapes, f"{LAYERS}.0.attention.{norm}.weight", 1)
    if head_dim > dim or dim % head_dim or head_dim % 2:
        raise BadWeights(f"heads of {head_dim} channels do not divide the width {dim}")
    count, channels = infer.count_layers(shapes, LAYERS), width // PATCH**2
    refiner = refiner_kind(shapes, channels, untrained)
    places = _stated_places(metadata.get("places"), count)
    least = 0 if refiner == SHARED or (refiner == PLAIN and places) else 1
    return ControlConfig(
        dim=dim,
        n_heads=dim // head_dim,
        hidden_dim=hidden,
        channels=channels,
        n_layers=count,
        n_refiner_layers=0 if refiner == SHARED else max(least, infer.count_layers(shapes, REFINER)),
        refiner=refiner,
        places=places,
    )


def _stated_places(value: Any, count: int) -> tuple[int, ...] | None:
    """The places that a file states in its metadata, which has text or a list of numbers."""
    if value is None:
        return None
    try:
        text = str(value) if isinstance(value, int) else value  # "0" is read as a number
        parts = text.strip("[]() ").split(",") if isinstance(text, str) else text
        places = tuple(int(part) for part in islice(parts, count + 1))  # an array of a GGUF may be long
    except (TypeError, ValueError):
        places = ()
    if len(places) != count or list(places) != sorted(set(places)) or places[0] < 0:
        raise BadWeights(
            f"metadata 'places' is {printable(value, 60)!r}, wanted {count} rising numbers, one for each "
            "control layer"
        )
    return places
