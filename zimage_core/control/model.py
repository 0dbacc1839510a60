"""The ControlNet: blocks of the S3-DiT that read control latents and give hints to layers of the base model.

Module names are those of the files, and of diffusers' ZImageControlNetModel. What it shares with the base
model (timestep embedder, rotations, captions, pad token) it does not have. Source: VideoX-Fun's
ZImageControlTransformer2DModel; the formulae are in docs/guides/control.md.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.config import TransformerConfig
from zimage_core.control.config import ControlConfig
from zimage_core.models import sequence
from zimage_core.models.block_source import RESIDENT, BlockSource
from zimage_core.models.ported import Network
from zimage_core.models.transformer import TransformerBlock
from zimage_core.nn.linear import Linear
from zimage_core.weights.controlnets import PLAIN


class ControlBlock(TransformerBlock):
    """A modulated block whose result, projected, is a hint; the first also takes in the base's tokens."""

    def __init__(self, config: TransformerConfig, first: bool) -> None:
        super().__init__(config, modulated=True)
        if first:
            self.before_proj = Linear(config.dim, config.dim, bias=True)
        self.after_proj = Linear(config.dim, config.dim, bias=True)

    def begin(self, control: Tensor, x: Tensor) -> Tensor:
        """Control tokens and the base model's tokens, both [L, dim] -> what the first block starts from."""
        out: Tensor = self.before_proj(control) + x
        return out

    def hint(self, control: Tensor) -> Tensor:
        """Result of this block [L, dim] -> what is added to the base model's tokens."""
        out: Tensor = self.after_proj(control)
        return out


class ControlNet(Network):
    """A ControlNet; `control.apply` runs it beside a base model."""

    loader = "load_controlnet"
    name = ""
    """Name under which a pipeline has it."""
    hints = "trainer"
    """Where its hints for the noise refiner go, one of `control.apply.HINTS`."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.config = config
        self._key = config.blocks.patch_key
        blocks = config.blocks
        self.control_all_x_embedder = nn.ModuleDict(
            {self._key: Linear(blocks.patch_dim, config.dim, bias=True)}
        )
        self.control_layers = nn.ModuleList(ControlBlock(blocks, i == 0) for i in range(config.n_layers))
        self.control_noise_refiner = nn.ModuleList(
            TransformerBlock(blocks, modulated=True)
            if config.refiner == PLAIN
            else ControlBlock(blocks, i == 0)
            for i in range(config.n_refiner_layers)
        )
        self.stream: BlockSource = RESIDENT

    @classmethod
    def from_single_file(cls, path: str | PathLike[str], **options: Any) -> ControlNet:
        """Load a file, as `zimage_core.load_controlnet` does; arguments are those of `from_pretrained`."""
        return cls.from_pretrained(path, **options)

    @property
    def blocks(self) -> tuple[TransformerBlock, ...]:
        """The blocks of a step in their order: refiner, then layers."""
        return (*self.control_noise_refiner, *self.control_layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation; the packed weights do not depend on it."""
        return self._bias.dtype

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self._bias.device

    @property
    def _bias(self) -> Tensor:
        found: Any = self.control_all_x_embedder[self._key]
        return found.bias  # type: ignore[no-any-return]

    def embed(self, latents: Tensor, pad: Tensor, count: int) -> Tensor:
        """Control latents [channels, h, w] and the base's pad token [1, dim] -> tokens [count, dim]."""
        patch = self.config.blocks.patch_size
        found = self.control_all_x_embedder[self._key](sequence.patchify(latents.to(self.dtype), patch))
        return torch.cat((found, pad.to(found).expand(count - len(found), -1)))

    def modulate(self, temb: Tensor) -> Tensor:
        """Timestep embeddings of the base model [S, adaln_dim] -> [S, blocks, 4 * dim] float32."""
        return torch.stack([block.modulation(temb) for block in self.blocks], dim=1)


ZImageControlNetModel = ControlNet
"""diffusers' name."""
