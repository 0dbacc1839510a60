"""A network made ready to write one token at a time on a CPU; `quant.few_rows` has the forms of weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from zimage_core.nn.linear import Linear
from zimage_core.quant.few_rows import FewRows, form_of, mode_here, prepare
from zimage_core.quant.tensor import QuantTensor


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
        self.mode = mode_here(mode)
        self._made: list[tuple[Linear, QuantTensor, FewRows]] = []
        self.skipped = 0
        """Number of packed weights that stay as they are."""
        layers: dict[int, list[Linear]] = {}
        for layer in network.modules():
            if isinstance(layer, Linear) and isinstance(layer.weight, QuantTensor):
                layers.setdefault(id(layer.weight), []).append(layer)
        wanted = []
        for same in layers.values():
            form, size = form_of(same[0].weight, self.mode), same[0].in_features * same[0].out_features
            if form is not None:
                wanted.append((form.nbytes / size, -size, form.nbytes, same))
        self.skipped = len(layers)
        for _, _, nbytes, same in sorted(wanted, key=lambda each: each[:2]):
            weight = same[0].weight
            if nbytes > budget or not isinstance(weight, QuantTensor):
                continue
            few = prepare(weight, self.mode)
            if few is None:
                continue
            budget -= nbytes
            self.skipped -= 1
            self._made += [(layer, weight, few) for layer in same]
        self.nbytes = sum(few.nbytes for few in {id(few): few for _, _, few in self._made}.values())
        """Bytes of the forms."""
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
            for layer, _ in layers:
                layer.few = None


@contextmanager
def ready_for_decoding(
    network: nn.Module, mode: str = "auto", budget: int = 1 << 62
) -> Iterator[ReadyWeights]:
    """Inside, a network on a CPU multiplies a few rows quickly; see `ReadyWeights`, which is what it gives.

    To make the forms takes about as long as five tokens without them.

    Args:
        network: A language model.
        mode: One of `few_rows.MODES`.
        budget: Bytes that the forms may take.

    Raises:
        BadArgument: There is no such mode.
    """
    with ReadyWeights(network, mode, budget).bound() as ready:
        yield ready
