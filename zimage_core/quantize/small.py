"""TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0 and Q2_0_128."""

from __future__ import annotations

from zimage_core.quantize.blocks import Encoder

ENCODERS: dict[str, Encoder] = {}
