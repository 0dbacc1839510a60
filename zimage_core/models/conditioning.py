"""What the steps of one run have in common, computed once: captions, rotations, adaptive norms.

The caption's tokens leave the context refiner the same in every step, the rotations depend on sizes alone,
and the adaptive norms on the time alone: all times of a run go through their matrices together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zimage_core.nn.rope import Rotation

if TYPE_CHECKING:
    from zimage_core.models.transformer import ZImageTransformer


class Modulation(NamedTuple):
    """Adaptive norms at one time, in the model's dtype.

    Args:
        blocks: [modulated blocks, 4 * dim], noise refiner first; see `TransformerBlock`.
        final: [dim], of the final layer.
    """

    blocks: Tensor
    final: Tensor


class Conditioning:
    """Remembers results of a transformer's parts for the length of a run; weights must not change meanwhile.

    Args:
        transformer: Computes them.
        times: Network times of the steps, each a float32 value; others are computed when they come.
    """

    def __init__(self, transformer: ZImageTransformer, times: Sequence[float] = ()) -> None:
        self._transformer = transformer
        self._times = tuple(times)
        self._modulations: dict[float, Modulation] = {}
        self._captions: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._rotations: dict[tuple[int, int, int], Rotation] = {}

    def modulation(self, time: Tensor) -> Modulation:
        """Of one time, a float32 scalar tensor."""
        value = float(time)
        if value not in self._modulations:
            together = self._times if value in self._times else (value,)
            blocks, final = self._transformer.modulate(torch.tensor(together, dtype=torch.float32))
            for i, each in enumerate(together):
                self._modulations[each] = Modulation(blocks[i], final[i])
        return self._modulations[value]

    def caption(self, features: Tensor) -> Tensor:
        """Caption features [L, cap_feat_dim] -> refined tokens [padded, dim]."""
        # tensors of inference mode count no versions, and may not be changed outside of it
        key = (id(features), 0 if features.is_inference() else features._version)
        if key not in self._captions:
            # the features are kept, so that their id stays theirs
            self._captions[key] = (features, self._transformer.refine(features))
        return self._captions[key][1]

    def rotation(self, rows: int, cols: int, padded_caption: int) -> Rotation:
        """Of the joint sequence: image tokens, then the caption's."""
        key = (rows, cols, padded_caption)
        if key not in self._rotations:
            self._rotations[key] = self._transformer.joint_rotation(*key)
        return self._rotations[key]
