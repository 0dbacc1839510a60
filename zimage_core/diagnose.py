"""Where NaN or infinity first appears: in which block, and whether a weight is to blame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zimage_core.errors import NonFinite

ROWS = 1024
"""Rows of a packed weight that are unpacked at a time when it is searched."""


@contextmanager
def watch(model: nn.Module, name: str) -> Iterator[None]:
    """Raise NonFinite at the first submodule of `model` whose output is not finite.

    Costs one reduction and one synchronisation per submodule, so it is for `debug=True` and for the second
    run after a failure. Hooks see what was computed inside, also what later norms would hide.

    Args:
        model: Runs inside the `with` block.
        name: What the message calls it.

    Raises:
        NonFinite: Names the block, the submodule, and the tensor if a weight holds the bad number.
    """

    def hook(place: str) -> Callable[..., None]:
        def check(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if _bad(output):
                raise NonFinite(f"{name}: {_sentence(model, module, place, inputs)}")

        return check

    handles = [m.register_forward_hook(hook(place)) for place, m in model.named_modules() if place]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def explain(model: nn.Module, name: str, again: Callable[[], object]) -> str:
    """Run `again` (which calls `model`) under watch -> a sentence on where the bad number came from."""
    try:
        with watch(model, name):
            again()
    except NonFinite as error:
        return str(error)
    return f"{name}: every block is finite when it is run again; the memory or the device may be faulty"


def _sentence(model: nn.Module, module: nn.Module, place: str, inputs: tuple[Any, ...]) -> str:
    where = f"first in {place} ({_block(place)})"
    tensor = _bad_weight(model, module, place)
    if tensor is not None:
        return (
            f"{where}, because the weight {tensor} holds NaN or infinity; get the file again or another one"
        )
    dtype = next((t.dtype for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
    if any(_bad(value) for value in inputs):
        return f"{where}, which was given NaN or infinity; its own weights are finite"
    short = str(dtype).removeprefix("torch.") if dtype is not None else "its dtype"
    return f"{where}, from finite weights and inputs: {short} is too narrow here; use bfloat16 or float32"


def _block(place: str) -> str:
    parts = place.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return "block " + ".".join(parts[: i + 1])
    return f"block {parts[0]}"


def _bad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    return isinstance(value, (tuple, list)) and any(_bad(v) for v in value)


def _bad_weight(model: nn.Module, module: nn.Module, place: str) -> str | None:
    """Name of the non-finite tensor: the module's own, else one that hangs directly in a module above."""
    chain = [(place, module)]
    parts = place.split(".")
    chain += [
        (".".join(parts[:n]), model.get_submodule(".".join(parts[:n]))) for n in range(len(parts) - 1, -1, -1)
    ]
    for prefix, owner in chain:
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if _bad(tensor):
                return f"{prefix}.{name}".lstrip(".")
        quant = getattr(owner, "quant", None)
        if quant is not None and _bad_quant(quant):
            return f"{prefix}.weight".lstrip(".")
    return None


def _bad_quant(quant: Any) -> bool:
    rows = quant.shape[0]
    return any(_bad(quant.rows(i, min(i + ROWS, rows)).dequantize()) for i in range(0, rows, ROWS))
