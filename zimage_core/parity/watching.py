"""Sees the values between the blocks of a network, and puts others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["in", "out", "rotation"]
See = Callable[[str, Tensor], "Tensor | None"]
"""(name of a place, the value there) -> a value to go on with, or None for the same."""


@dataclass(frozen=True)
class Place:
    """A value that both networks have.

    Args:
        name: Name in the report.
        module: The module that has it, which has the same name in both.
        side: Its first argument, its result, or its rotary positions.
        cut: Whether the peer computes it for pad tokens too, which ours leaves out.
    """

    name: str
    module: str
    side: Side = "out"
    cut: bool = False


@contextmanager
def watched(model: nn.Module, places: Sequence[Place], see: See, entered: list[str]) -> Iterator[None]:
    """Call `see` at every place while the model runs.

    Args:
        model: The network.
        places: The places, in the order of a run.
        see: What to call.
        entered: Gets the name of the place that is being computed, for the report of an error.
    """
    with ExitStack() as hooks:
        for place in places:
            module = model.get_submodule(place.module)
            before, after = _hooks(place, see, entered)
            hooks.callback(module.register_forward_pre_hook(before).remove)
            if after is not None:
                hooks.callback(module.register_forward_hook(after).remove)
        yield


def _hooks(place: Place, see: See, entered: list[str]) -> tuple[Any, Any]:
    """The hooks before and after a module for one place."""

    def enter(_: nn.Module, __: Any) -> None:
        entered.append(place.name)

    def first(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        other = see(place.name, args[0])
        return None if other is None else (other, *args[1:])

    def rotation(_: nn.Module, args: tuple[Any, ...]) -> None:
        found = next(
            a for a in args[1:] if isinstance(a, tuple) or (isinstance(a, Tensor) and a.is_complex())
        )
        if isinstance(found, Tensor):
            found = (found.real, found.imag)
        see(place.name, torch.cat(found, -1))

    def result(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            other = see(place.name, out[0])
            return None if other is None else (other, *out[1:])
        return see(place.name, out)

    if place.side == "out":
        return enter, result
    return (first if place.side == "in" else rotation), None


class Recorder:
    """Keeps the values of a run."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        """See one value."""
        self.values[name] = _rows(value).clone()


class Forced(Recorder):
    """Keeps the values of a run, and puts those of another run in their place.

    So each block gets the inputs of the other run, and its error is its own.

    Args:
        recorded: Values of the other run. They may have more rows, of pad tokens that this network leaves
            out.
        free: Places whose values are only seen.
    """

    def __init__(self, recorded: Mapping[str, Tensor], free: Sequence[str] = ()) -> None:
        super().__init__()
        self._recorded, self._free = recorded, free

    def __call__(self, name: str, value: Tensor) -> Tensor | None:  # type: ignore[override]
        """See one value and replace it."""
        super().__call__(name, value)
        other = self._recorded.get(name)
        if other is None or name in self._free or other.shape[-1] != value.shape[-1]:
            return None
        rows = _rows(value)
        if len(other) < len(rows):
            return None
        same = other[: len(rows)].to(value.dtype).reshape(value.shape)
        return torch.empty_like(value).copy_(same)  # in the layout that this network computes in


def _rows(value: Tensor) -> Tensor:
    """Values as rows of the last axis: one image at a time has no axis of a batch."""
    return value.detach().reshape(-1, value.shape[-1])
