"""Finds where NaN or infinity first appears: in which block, and whether a weight causes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zimage_core.errors import NonFinite
from zimage_core.models.block_norms import NAMES
from zimage_core.quant.tensor import QuantTensor

ROWS = 1024
"""Rows of a packed weight that are dequantised at a time during the search."""


@contextmanager
def watch(model: nn.Module, name: str) -> Iterator[None]:
    """Raise NonFinite at the first submodule of `model` whose output is not finite.

    This costs one reduction and one synchronisation per submodule, so it is for `debug=True` and for the
    second run after a failure. The hooks see every intermediate output, also those that later norms would
    hide.

    Args:
        model: The network that runs inside the `with` block.
        name: Name of the network for the message.

    Raises:
        NonFinite: The message names the block, the submodule, and the weight if one holds the bad number.
    """

    def hook(place: str) -> Callable[..., None]:
        def check(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if _bad(output):
                raise NonFinite(f"{name}: {_sentence(model, module, place, inputs)}")

        return check

    # a block's norms run fused as long as they have no hooks, which would change the rounding
    watched = [(p, m) for p, m in model.named_modules() if p and p.rpartition(".")[2] not in NAMES]
    handles = [module.register_forward_hook(hook(place)) for place, module in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Guard:
    """Hook that refuses a non-finite output; a class, so that a guarded model can still be pickled."""

    def __init__(self, name: str, place: str) -> None:
        self.name, self.place = name, place

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if _bad(output):
            raise NonFinite(f"{self.name}: {_sentence(module, module, self.place, inputs)}")


def guard_attention(model: nn.Module, name: str) -> None:
    """Check queries and keys of every attention in `model` from now on.

    On a CPU, softmax turns a row of scores that are all minus infinity into zeros. A bad weight before it
    would then give a wrong image instead of a non-finite one; nothing else in the networks hides a bad
    number. The transformer needs no guard: its queries and keys go through a norm, which turns infinity into
    NaN, and NaN passes through the softmax.
    """
    for place, module in model.named_modules():
        guarded = any(isinstance(hook, _Guard) for hook in module._forward_hooks.values())
        if place.rpartition(".")[2] in ("to_q", "to_k", "q_proj", "k_proj") and not guarded:
            module.register_forward_hook(_Guard(name, place))


def checked(
    model: nn.Module, name: str, call: Callable[[], torch.Tensor], debug: bool = False
) -> torch.Tensor:
    """Return the result of `call`, which runs `model`, after checking that it is finite.

    Raises:
        NonFinite: The message names block and tensor, found by a second run, or at once with `debug`.
    """
    if debug:
        with watch(model, name):
            return call()
    try:
        out = call()
        if bool(torch.isfinite(out).all()):
            return out
    except NonFinite:
        pass  # a guard raised it, perhaps long after the first bad number; `explain` finds that
    raise NonFinite(explain(model, name, call))


def explain(model: nn.Module, name: str, again: Callable[[], object]) -> str:
    """Run `again`, which calls `model`, under `watch`; say in a sentence where the bad number came from."""
    try:
        with watch(model, name):
            again()
    except NonFinite as error:
        return str(error)
    return f"{name}: every block is finite when it is run again; the memory or the device may be faulty"


def _sentence(model: nn.Module, module: nn.Module, place: str, inputs: tuple[Any, ...]) -> str:
    where = f"first in {place} (block {_block(place)})"
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
    """The module's name up to its first number: layers.3.attention.to_q -> layers.3."""
    parts = place.split(".")
    depth = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[:depth])


def _bad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not value.numel():
            return False
        # both propagate NaN, and unlike isfinite they need no memory of the tensor's size
        return not bool(torch.isfinite(torch.stack((value.amin(), value.amax()))).all())
    return isinstance(value, (tuple, list)) and any(_bad(v) for v in value)


def _bad_weight(model: nn.Module, module: nn.Module, place: str) -> str | None:
    """Name of a non-finite tensor: of the module, else directly of a module around it, else of its block.

    The whole block is searched because its norms are not run as modules: element-wise operations read their
    weights.
    """
    chain = [(place, module)]
    parts = place.split(".") if module is not model else []
    chain += [
        (".".join(parts[:n]), model.get_submodule(".".join(parts[:n]))) for n in range(len(parts) - 1, -1, -1)
    ]
    if module is not model:
        block = _block(place)
        inside = model.get_submodule(block).named_modules()
        chain += [(f"{block}.{name}".rstrip("."), owner) for name, owner in inside]
    for prefix, owner in chain:
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if _bad(tensor):
                return f"{prefix}.{name}".lstrip(".")
        weight = getattr(owner, "weight", None)
        if isinstance(weight, QuantTensor) and _bad_quant(weight):
            return f"{prefix}.weight".lstrip(".")
    return None


def _bad_quant(quant: QuantTensor) -> bool:
    rows = quant.shape[0]
    return any(_bad(quant.rows(i, min(i + ROWS, rows)).dequantize()) for i in range(0, rows, ROWS))
