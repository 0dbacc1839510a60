"""Noise levels: which sigmas a run of N steps visits.

The checkpoint's shift s maps a uniform grid u = 1, (N-1)/N, ..., 1/N to sigma = s u / (1 + (s - 1) u), and a
final 0 is appended, so N steps mean N calls of the network. Other programs build other grids from the same
number of steps: nine steps in diffusers before mid-2026 are eight steps here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from zimage_core.errors import BadArgument, printable
from zimage_core.sampling.stepping import Stepping, Walk
from zimage_core.scheduler_config import SHIFTS, TURBO_SHIFT, scheduler_shift

MAX_STEPS = 1000
"""Most steps: the number of trained noise levels, since more would visit a level twice."""

BASE_SHIFT = 6.0
"""Shift in the base checkpoint's scheduler_config.json; the distilled checkpoints have 3."""


@dataclass(frozen=True)
class FlowMatchEulerScheduler(Stepping):
    """The static-shift schedule of every Z-Image checkpoint.

    All values are computed in float32, with the same operations as in diffusers, so that they agree bit for
    bit (tests/parity/test_pipeline.py).

    Args:
        shift: The shift s of the noise levels: 3 for Turbo, 6 for the base checkpoint.

    Raises:
        BadArgument: The shift is not a number in `SHIFTS`.

    Source: Esser et al. 2024, arXiv 2403.03206, section 5.3.2 (the shift of noise levels).
    """

    shift: float = TURBO_SHIFT
    _walk: Walk = field(default_factory=Walk, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shift: object = self.shift  # the caller may have passed any type
        low, high = SHIFTS
        if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not low <= shift <= high:
            huge = isinstance(shift, int) and abs(shift) > 10**40  # str() refuses it
            found = "a huge integer" if huge else printable(shift, 40)
            raise BadArgument(
                f"shift: got {found}, wanted a positive number from {low:g} to {high:g} "
                "(3 for Turbo, 6 for base)"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FlowMatchEulerScheduler:
        """The schedule that a diffusers scheduler_config.json describes.

        What the file asks for and does not get is warned of where images may still be right: another sampler
        for a flow-matching model, a missing shift, unknown keys.

        Raises:
            Unsupported: The file describes a schedule that no Z-Image checkpoint uses.
            BadArgument: The shift is not a number in `SHIFTS`.
        """
        shift, cautions = scheduler_shift(values)
        for caution in cautions:
            warnings.warn(f"scheduler_config.json: {caution}", UserWarning, stacklevel=2)
        return cls(shift=shift)

    def levels(self, steps: int) -> tuple[float, ...]:
        """Noise levels of `steps` steps: steps + 1 float32 values, falling from 1 to 0."""
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            # repr() refuses a huge integer
            found = repr(steps) if type(steps) is not int or abs(steps) < 10**40 else "a huge integer"
            raise BadArgument(f"num_inference_steps: got {found}, an integer from 1 to {MAX_STEPS} is needed")
        return self.bent(torch.linspace(1.0, 1 / steps, steps))

    def shifted(self, levels: Sequence[float]) -> tuple[float, ...]:
        """Noise levels of the caller's own grid: shifted as in diffusers, with a final 0 appended.

        Args:
            levels: Falling values in (0, 1], before the shift, without the final 0.

        Raises:
            BadArgument: The grid is empty, too long, not falling in float32, or outside (0, 1].
        """
        grid = [float(u) for u in levels]
        if not 1 <= len(grid) <= MAX_STEPS:
            raise BadArgument(f"sigmas: got {len(grid)} values, 1 to {MAX_STEPS} are needed")
        if not all(0 < u <= 1 for u in grid) or any(a <= b for a, b in pairwise(grid)):
            raise BadArgument(
                "sigmas: values must fall and lie in (0, 1], without the final 0, which is appended "
                "(they are given before the shift, as in diffusers)"
            )
        return self.bent(torch.tensor(grid, dtype=torch.float32))

    def bent(self, u: torch.Tensor) -> tuple[float, ...]:
        """Noise levels of a falling grid u [N] in (0, 1], with a final 0 appended.

        Raises:
            BadArgument: Two of them are equal in float32: samplers divide by the length of a step.
        """
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        found = (*(float(s) for s in sigma), 0.0)
        if any(now <= then for now, then in pairwise(found)):
            raise BadArgument(
                "sigmas: two noise levels are equal in float32; wanted values farther apart, fewer steps or "
                "a smaller shift"
            )
        return found


FlowMatchEulerDiscreteScheduler = FlowMatchEulerScheduler
"""Diffusers' name of the class."""
