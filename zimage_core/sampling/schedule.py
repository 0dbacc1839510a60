"""Noise levels: which sigmas a run of N steps visits.

The checkpoint's shift s maps a uniform grid u = 1, (N-1)/N, ..., 1/N to sigma = s u / (1 + (s - 1) u), and a
final 0 is appended, so N steps mean N calls of the network. Other programs build other grids from the same
number of steps: nine steps in diffusers before mid-2026 are eight steps here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from zimage_core.errors import BadArgument, Unsupported

MAX_STEPS = 1000
"""Most steps: the number of trained noise levels, since more would visit a level twice."""

BASE_SHIFT = 6.0
"""Shift in the base checkpoint's scheduler_config.json; the distilled checkpoints have 3."""

_FIXED = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


@dataclass(frozen=True)
class FlowMatchEulerScheduler:
    """The static-shift schedule of every Z-Image checkpoint.

    All values are computed in float32, with the same operations as in diffusers, so that they agree bit for
    bit (tests/parity/test_pipeline.py).

    Args:
        shift: The shift s of the noise levels: 3 for Turbo, 6 for the base checkpoint.

    Raises:
        BadArgument: The shift is not a positive finite number.

    Source: Esser et al. 2024, arXiv 2403.03206, section 5.3.2 (the shift of noise levels).
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        shift: object = self.shift  # the caller may have passed any type
        if not (isinstance(shift, (int, float)) and math.isfinite(shift) and shift > 0):
            raise BadArgument(
                f"shift: got {self.shift!r}, wanted a positive number (3 for Turbo, 6 for base)"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FlowMatchEulerScheduler:
        """The schedule that a diffusers scheduler_config.json describes.

        Raises:
            Unsupported: The file describes a schedule that no Z-Image checkpoint uses.
        """
        for key, wanted in _FIXED.items():
            found = values.get(key, wanted)
            if (found or None) != (wanted or None):
                raise Unsupported(
                    f"scheduler_config.json: {key} is {found!r}, Z-Image schedules have {wanted!r}; "
                    f"remove the key or pass scheduler=FlowMatchEulerScheduler(shift=...)"
                )
        return cls(shift=float(values.get("shift", 3.0)))

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """Noise levels of `steps` steps: steps + 1 float32 values, falling from 1 to 0."""
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            # repr() refuses a huge integer
            found = repr(steps) if type(steps) is not int or abs(steps) < 10**40 else "a huge integer"
            raise BadArgument(f"num_inference_steps: got {found}, an integer from 1 to {MAX_STEPS} is needed")
        return self._bend(torch.linspace(1.0, 1 / steps, steps))

    def shifted(self, levels: Sequence[float]) -> tuple[float, ...]:
        """Noise levels of the caller's own grid: shifted as in diffusers, with a final 0 appended.

        Args:
            levels: Falling values in (0, 1], before the shift, without the final 0.

        Raises:
            BadArgument: The grid is empty, too long, not falling, or outside (0, 1].
        """
        grid = [float(u) for u in levels]
        if not 1 <= len(grid) <= MAX_STEPS:
            raise BadArgument(f"sigmas: got {len(grid)} values, 1 to {MAX_STEPS} are needed")
        if not all(0 < u <= 1 for u in grid) or any(a <= b for a, b in pairwise(grid)):
            raise BadArgument(
                "sigmas: values must fall and lie in (0, 1], without the final 0, which is appended "
                "(they are given before the shift, as in diffusers)"
            )
        return self._bend(torch.tensor(grid, dtype=torch.float32))

    def _bend(self, u: torch.Tensor) -> tuple[float, ...]:
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return (*(float(s) for s in sigma), 0.0)
