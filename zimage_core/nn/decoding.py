"""A network made ready to write one token at a time on a CPU; `quant.few_rows` has the forms of weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.cpu.pool import MAX_WORKERS
from zimage_core.nn.linear import Linear
from zimage_core.quant.few_rows import Shared, form_of, prepare, stack, stacks_with
from zimage_core.quant.tensor import QuantTensor

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a block that read the same x one after the other; they are multiplied at once if they can be."""

PAYS_FROM = 8
"""Tokens from which on the forms pay; to make them takes the time of about five tokens without them."""
MAKING = 64 << 20
"""Most bytes that a thread takes while it makes a form: some rows as codes or int8, and what decodes them."""

Product = Callable[[Tensor], Tensor]
Group = dict[QuantTensor, list[Linear]]
"""Weights that are multiplied at once, with the layers that have them."""


class ReadyWeights:
    """Forms of a network's packed weights for products of a few rows; its layers use them inside `bound`.

    A weight that two layers share is put into a form once. Those that need the fewest bytes for a weight come
    first, and of those the largest, as long as the bytes suffice. The others are multiplied as ever.

    Args:
        network: Any module whose `Linear`s are wanted.
        mode: One of `few_rows.MODES`.
        budget: Bytes that all forms may take beside the weights.

    Raises:
        BadArgument: There is no such mode.
    """

    def __init__(self, network: nn.Module, mode: str, budget: int) -> None:
        started = time.perf_counter()
        self.mode = mode
        groups = _groups(network)
        self.skipped = sum(len(group) for group in groups)
        """Number of packed weights that stay as they are."""
        self.nbytes = 0
        """Bytes of the forms."""
        self._made: list[tuple[Linear, QuantTensor, Product]] = []
        wanted = _costs(groups, mode)
        for nbytes, group in sorted(wanted, key=lambda each: (each[0] / _size(each[1]), -_size(each[1]))):
            if nbytes > budget - self.nbytes:
                continue
            weights = list(group)
            whole = weights[0] if len(group) == 1 else stack(weights)
            few = prepare(whole, self.mode)
            if few is None:
                continue
            self.nbytes += few.nbytes
            self.skipped -= len(group)
            parts: list[Product] = [few]
            if len(group) > 1:
                parts = Shared(few, [weight.shape[0] for weight in weights]).parts()
            for weight, part in zip(weights, parts, strict=True):
                self._made += [(layer, weight, part) for layer in group[weight]]
        self.seconds = time.perf_counter() - started
        """Seconds that making them took."""

    @contextmanager
    def bound(self) -> Iterator[ReadyWeights]:
        """Inside, the layers multiply a few rows by their forms, but for weights that were replaced since."""
        layers = [(layer, few) for layer, weight, few in self._made if layer.weight is weight]
        try:
            for layer, few in layers:
                layer.few = few
            yield self
        finally:
            for layer, few in layers:
                if layer.few is few:  # another pipeline may write with the same layers
                    layer.few = None


@contextmanager
def ready_for_decoding(
    network: nn.Module, mode: str = "auto", budget: int = 1 << 62
) -> Iterator[ReadyWeights]:
    """Inside, a network on a CPU multiplies a few rows quickly; see `ReadyWeights`, which is what it gives.

    Args:
        network: A language model.
        mode: One of `few_rows.MODES`.
        budget: Bytes that the forms may take.

    Raises:
        BadArgument: There is no such mode.
    """
    with ReadyWeights(network, mode, budget).bound() as ready:
        yield ready


def mode_of(encoder: Any) -> str:
    """The mode that a text encoder's `compute=` means, one of `few_rows.MODES`."""
    asked: str = getattr(encoder, "asked", encoder.compute)
    return "bfloat16" if asked == "exact" and encoder.dtype == torch.bfloat16 else asked


def forms_bytes(network: nn.Module, mode: str) -> tuple[int, int]:
    """Bytes of all forms of a network, and the most beside them while one is made.

    Raises:
        BadArgument: There is no such mode.
    """
    found = _costs(_groups(network), mode)
    stacked = (sum(weight.nbytes for weight in group) for _, group in found if len(group) > 1)
    making = (1 + min(torch.get_num_threads(), MAX_WORKERS)) * MAKING + max(stacked, default=0)
    return sum(nbytes for nbytes, _ in found), making if found else 0


def _costs(groups: Sequence[Group], mode: str) -> list[tuple[int, Group]]:
    """Groups whose weights all have a form, with the bytes of these."""
    costs = [(group, [form_of(weight, mode) for weight in group]) for group in groups]
    return [(sum(form.nbytes for form in forms if form), group) for group, forms in costs if all(forms)]


def _groups(network: nn.Module) -> list[Group]:
    """All packed weights of a network's layers, those that are multiplied at once together."""
    layers: Group = {}
    for module in network.modules():
        if isinstance(module, Linear) and isinstance(module.weight, QuantTensor):
            layers.setdefault(module.weight, []).append(module)
    groups = []
    for module in network.modules():
        for names in TOGETHER:
            found = [weight for name in names if (weight := _own(module, name, layers)) is not None]
            alike = [weight for weight in found if stacks_with(weight, found[0])]
            if len(alike) > 1:
                groups.append({weight: layers.pop(weight) for weight in alike})
    return groups + [{weight: same} for weight, same in layers.items()]


def _own(module: nn.Module, name: str, layers: Group) -> QuantTensor | None:
    """The weight of a layer inside a module, if no other layer has it."""
    layer = getattr(module, name, None)
    weight = layer.weight if isinstance(layer, Linear) else None
    return weight if isinstance(weight, QuantTensor) and len(layers.get(weight, ())) == 1 else None


def _size(group: Group) -> int:
    return sum(weight.shape[0] * weight.shape[1] for weight in group)
