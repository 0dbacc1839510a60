"""How large a transformer's file may be for a card to keep all of its weights while it computes."""

from __future__ import annotations

from os import PathLike

from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, OverBudget
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.files.units import in_bytes
from zimage_core.memory.activations import denoise_bytes
from zimage_core.memory.job import WORKSPACE
from zimage_core.quant.dispatch import SCRATCH_BYTES

CAPTION = 128
"""Tokens of a caption, as `zimage plan` supposes."""
STEPS = 8


def largest_transformer(
    path: str | PathLike[str], vram: int, width: int, height: int, dtype: str = "bfloat16"
) -> int:
    """Bytes of a transformer that leaves room in `vram` for one picture's steps, all weights resident.

    What else a step holds is what `memory.plan` counts: activations, dense weights a matrix at a time, and
    the workspace of libraries. The text encoder and the VAE come before and after it (docs/memory.md).

    Args:
        path: The checkpoint, of any number of bits: its network's sizes count.
        vram: Bytes.
        width: Of the picture in pixels.
        height: Likewise.
        dtype: Of the computation.

    Raises:
        BadArgument: It is no transformer, or a side is not a multiple of 16.
        OverBudget: The steps alone need more.
    """
    with Checkpoint(path, "transformer") as checkpoint:
        config = checkpoint.config
    if not isinstance(config, TransformerConfig):
        raise BadArgument("fit: wanted the checkpoint of a transformer")
    factor = AutoencoderConfig().spatial_factor
    multiple = factor * config.patch_size
    if width < 1 or height < 1 or width % multiple or height % multiple:
        raise BadArgument(f"fit: got {width} x {height} px, wanted multiples of {multiple}")
    live = denoise_bytes(config, height // factor, width // factor, CAPTION, dtype, 1, 1, STEPS)
    around = live + SCRATCH_BYTES + max(WORKSPACE.values())
    if vram <= around:
        raise OverBudget(
            f"fit: {in_bytes(vram)} of GPU memory do not hold the steps of {width} x {height} px, which take "
            f"{in_bytes(around)} beside the weights; make a smaller picture"
        )
    return vram - around
