"""The option --lora: adapters by file and weight."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_core.assets import embedded_part
from zimage_core.errors import BadArgument, printable

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

MAX_WEIGHT = 100.0
"""`run.adapted.MAX_WEIGHT`, which a parser does not import."""


def add_lora(group: argparse._ActionsContainer) -> None:
    """The option --lora, which may be given several times."""
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA or another adapter, with its weight (default: 1); may be repeated; outline is that of "
        "the embedded model",
    )


def read_loras(given: Sequence[str]) -> list[tuple[str, float]]:
    """Files and weights of the options.

    A file whose name has a colon is found first: "a:1" is the file "a:1" if there is one, else "a" with
    weight 1.

    Raises:
        BadArgument: A weight is no number in its range; or there is no such file.
    """
    return [_read(text) for text in given]


def _read(text: str) -> tuple[str, float]:
    if not text:
        raise BadArgument("--lora: the name of a file is empty")
    name, colon, weight = text.rpartition(":")
    whole = _is_there(text)
    if whole or not colon or not name or {"/", "\\"} & set(weight):
        if not whole:
            raise BadArgument(f"--lora {printable(text)}: there is no such file")
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not abs(number) <= MAX_WEIGHT:
        raise BadArgument(
            f"--lora {printable(text)}: the weight {printable(weight, 40)!r} is no number from "
            f"-{MAX_WEIGHT:g} to {MAX_WEIGHT:g}; write FILE:0.8"
        )
    if not _is_there(name):
        raise BadArgument(f"--lora {printable(name)}: there is no such file")
    return name, number


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists() or embedded_part(name) is not None
    except (OSError, ValueError):
        return False


def load_loras(pipeline: ZImagePipeline, loras: Sequence[tuple[str, float]]) -> None:
    """Load adapters into a pipeline, in this order."""
    for path, weight in loras:
        pipeline.load_lora(path, weight)
