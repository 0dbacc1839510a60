"""The file of measured costs, type by type and tensor by tensor, that `zimage sensitivity` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

from zimage_core.errors import BadFile
from zimage_core.export.recipes import TYPES
from zimage_core.files.atomic import write_atomically
from zimage_core.files.untrusted import read_json

KIND = "zimage_core sensitivity 1"


@dataclass(frozen=True)
class Sensitivity:
    """Costs of types, tensor by tensor.

    Args:
        costs: Tensor of the single-file layout -> type -> squared velocity error over squared velocity.
        settings: Conditions of the measurement (prompts, steps, model), for the reader.
    """

    costs: dict[str, dict[str, float]]
    settings: dict[str, Any] = field(default_factory=dict)

    def total(self, types: Mapping[str, str]) -> float:
        """The expected cost of a choice of types, if the errors of tensors are independent."""
        return sum(self.costs[name].get(fmt, 0.0) for name, fmt in types.items() if name in self.costs)


def write_sensitivity(sensitivity: Sensitivity, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Write a sensitivity as JSON.

    Raises:
        BadFile: The file exists and may not be replaced, or cannot be written.
    """
    data = {"kind": KIND, "settings": sensitivity.settings, "costs": sensitivity.costs}
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode(), overwrite)


def read_sensitivity(path: str | PathLike[str]) -> Sensitivity:
    """Read a file of `write_sensitivity`.

    Raises:
        BadFile: The file cannot be read, is of another kind, or holds something else than costs.
    """
    content = read_json(path)
    try:
        if content.get("kind") != KIND or not content["costs"]:
            raise ValueError
        costs = {str(name): _row(row) for name, row in content["costs"].items()}
        settings = dict(content.get("settings") or {})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadFile(
            fspath(path), "not a sensitivity file, or an empty one", "make one with `zimage sensitivity`"
        ) from None
    return Sensitivity(costs, settings)


def _row(row: Mapping[str, Any]) -> dict[str, float]:
    found = {str(name): float(cost) for name, cost in row.items()}
    if not found or not all(name in TYPES and math.isfinite(c) and c >= 0 for name, c in found.items()):
        raise ValueError
    return found
