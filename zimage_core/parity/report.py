"""What a comparison with a peer found: a table for people and JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zimage_core.parity.precision import NARROW, WIDE

SCHEMA = 1
"""Number of the JSON's form; it grows if a field changes its meaning or goes away."""


@dataclass(frozen=True)
class Block:
    """One block, or another value that both programs have.

    All errors are largest absolute differences divided by `scale`.

    Args:
        name: Module name, or what the value is.
        scale: Largest number of the peer's result.
        error: In float32, both sides with the same input: the block's own error.
        tolerance: The error that is allowed.
        accumulated: In float32, each side with its own input: the error of this block and of all before it.
            It grows with the depth and is not judged. None where the values are one chain anyway.
        wide: As `error` in float64, where rounding does not count; None if it was not asked for.
    """

    name: str
    scale: float
    error: float
    tolerance: float
    accumulated: float | None = None
    wide: float | None = None

    @property
    def passes(self) -> bool:
        """Whether the block is within its tolerances; NaN is not."""
        return self.error <= self.tolerance and (self.wide is None or self.wide <= WIDE)

    def to_json(self) -> dict[str, Any]:
        """The fields; a number that is not finite is null."""
        return {
            "name": self.name,
            "passes": self.passes,
            "scale": _finite(self.scale),
            "error": _finite(self.error),
            "tolerance": _finite(self.tolerance),
            "accumulated": _finite(self.accumulated),
            "error_float64": _finite(self.wide),
        }


@dataclass(frozen=True)
class Component:
    """One network, or the latents of a run.

    Args:
        name: "transformer", "text_encoder", "vae" or "latents".
        peer: The peer's class.
        weights: Types of the weights in the file, such as "Q8_0, F32".
        quantised: Whether the peer got decoded weights.
        inputs: What both sides got.
        blocks: In the order of the peer's run.
        problem: The peer's error and the block where it was raised; "" if there was none.
        notes: What was not compared.
    """

    name: str
    peer: str
    weights: str
    quantised: bool
    inputs: str
    blocks: tuple[Block, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether all blocks are within tolerance and the peer ran."""
        return not self.problem and all(block.passes for block in self.blocks)

    @property
    def first(self) -> Block | None:
        """The first block outside its tolerance."""
        return next((block for block in self.blocks if not block.passes), None)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "name": self.name,
            "peer": self.peer,
            "passes": self.passes,
            "first_outside": None if self.first is None else self.first.name,
            "problem": self.problem,
            "weights": self.weights,
            "quantised": self.quantised,
            "inputs": self.inputs,
            "notes": list(self.notes),
            "blocks": [block.to_json() for block in self.blocks],
        }


@dataclass(frozen=True)
class ParityReport:
    """A checkpoint compared with a peer.

    Args:
        checkpoint: What was compared, as the caller named it.
        against: The peer.
        versions: Program -> version, and the instruction sets of the CPU.
        components: What was compared, in order.
        left_out: Component -> why it was not compared.
    """

    checkpoint: str
    against: str
    versions: Mapping[str, str]
    components: tuple[Component, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def passes(self) -> bool:
        """Whether every block of every component is within tolerance."""
        return bool(self.components) and all(component.passes for component in self.components)

    @property
    def first(self) -> tuple[str, str] | None:
        """Component and block that leave their tolerance first, or where the peer failed."""
        for component in self.components:
            if component.first is not None:
                return component.name, component.first.name
            if component.problem:
                return component.name, component.problem
        return None

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers; docs/guides/parity.md has the fields."""
        return {
            "schema": SCHEMA,
            "checkpoint": self.checkpoint,
            "against": self.against,
            "passes": self.passes,
            "first_outside": None if self.first is None else list(self.first),
            "versions": dict(self.versions),
            "left_out": dict(self.left_out),
            "components": [component.to_json() for component in self.components],
        }

    def lines(self) -> list[str]:
        """The report as lines of text, a table for each component."""
        lines = [f"{name} {version}" for name, version in self.versions.items()]
        lines = [", ".join(lines)]
        for component in self.components:
            lines += ["", *_table(component)]
        lines += [f"{name}: not compared: {why}" for name, why in self.left_out.items()]
        lines += ["", *self._verdict()]
        return lines

    def _verdict(self) -> list[str]:
        tolerance = (
            f"tolerance: {NARROW} times what float32 moves the peer itself, its distance from its own "
            f"float64 result on the same input; in float64 {WIDE:g}"
        )
        if self.first is None:
            count = sum(len(component.blocks) for component in self.components)
            return [tolerance, f"within tolerance: all {count} values"]
        component, block = self.first
        return [tolerance, f"outside tolerance, first: {component}: {block}"]


def _table(component: Component) -> list[str]:
    decoded = "; the peer got them decoded by the reference" if component.quantised else ""
    lines = [
        f"{component.name} against {component.peer}, {component.inputs}",
        f"weights {component.weights}{decoded}",
        *component.notes,
    ]
    rows: list[tuple[str, ...]] = [("block", "scale", "float32", "tolerance", "accumulated", "float64", "")]
    for b in component.blocks:
        figures = (b.error, b.tolerance, b.accumulated, b.wide)
        mark = "" if b.passes else "OUTSIDE"
        rows.append((b.name, f"{b.scale:.3g}", *("-" if f is None else f"{f:.1e}" for f in figures), mark))
    if len(rows) > 1:
        lines += _columns(rows)
    return [*lines, f"{component.peer} failed {component.problem}"] if component.problem else lines


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *figures in rows:
        cells = (f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True))
        lines.append("  ".join((f"{name:<{widths[0]}}", *cells)).rstrip())
    return lines


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
