"""Remarks on prompts that a model cannot draw; only the embedded one has a list of what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from zimage_core.assets import NANO, words
from zimage_core.weights.load import opened_file


def unlearned(text_encoder: nn.Module, prompts: Sequence[str] | None) -> list[str]:
    """What the caller should know of the prompts: a sentence for each that the embedded model cannot draw.

    Args:
        text_encoder: The text encoder of the run; the embedded one is known by the place of its file.
        prompts: The prompts; None if there are only features.
    """
    opened = opened_file(text_encoder)
    if opened is None or Path(opened.file.path).resolve().parent != NANO.resolve():
        return []
    return list(filter(None, map(words.remark, dict.fromkeys(prompts or ()))))
