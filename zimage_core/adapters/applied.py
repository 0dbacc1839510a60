"""The adapters of one network: which are loaded, with which weights, and the branches that they make.

They belong to the network and not to the pipeline, as in diffusers: pipelines that share a transformer share
its adapters. A pipeline's `from_pipe` therefore makes images with them too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.adapters.change import Branch, Change
from zimage_core.errors import BadWeights
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor

COLUMNS = 512
"""Columns of a weight that are merged at a time."""


@dataclass(frozen=True)
class Facts:
    """What is known of a loaded adapter.

    Args:
        name: Its name in the pipeline.
        title: What it was identified as.
        file: Name, size and hash of its file; empty for one that was given as tensors.
        kinds: Kinds of its changes, such as "LoRA" and "full difference".
        ranks: Smallest and largest rank of its low-rank parts; (0, 0) if it has none.
        layers: Layers, norms and pad tokens that it changes, by network.
        tensors: Tensors of the file that are used.
        unmatched: Names of tensors that match nothing.
    """

    name: str
    title: str
    file: Mapping[str, Any]
    kinds: tuple[str, ...]
    ranks: tuple[int, int]
    layers: Mapping[str, int]
    tensors: int
    unmatched: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter does to one network.

    Args:
        facts: What is known of it, the same for both networks.
        changes: Name of a Linear layer -> its change.
        values: Name of a parameter -> numbers that are added to it, and whether they replace it instead.
    """

    facts: Facts
    changes: Mapping[str, Change]
    values: Mapping[str, tuple[Tensor, bool]]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on the host."""
        tensors = [tensor for change in self.changes.values() for tensor in change.tensors()]
        return sum(t.nbytes for t in (*tensors, *(value for value, _ in self.values.values())))


@dataclass(frozen=True)
class State:
    """Which adapters are loaded and how they are used; replaced as a whole.

    Args:
        adapters: Name -> adapter, in the order of loading.
        weights: Name of each active adapter -> weight.
        enabled: Whether the active ones have an effect.
        fused: Names of those that are merged into the weights.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    enabled: bool = True
    fused: frozenset[str] = frozenset()

    def without(self, name: str) -> State:
        """The state after an adapter was unloaded."""
        rest = {key: each for key, each in self.adapters.items() if key != name}
        weights = {key: weight for key, weight in self.weights.items() if key != name}
        return replace(self, adapters=rest, weights=weights, fused=self.fused - {name})


class Applied:
    """The adapters of a network.

    Args:
        network: The transformer or the text encoder.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.state = State()
        self.version = 1
        """Counts changes, for what must not repeat an older state, such as a recorded graph."""
        self.merged: list[tuple[Facts, float]] = []
        """Adapters that are in the weights for good, with their weights."""
        self._branches: dict[str, Branch] = {}
        self._originals: dict[str, nn.Parameter] = {}  # parameters that are changed now, as they were before
        self._unfused: dict[str, nn.Parameter | QuantTensor] = {}  # weights before they were merged
        self._weights_before: dict[str, float] = {}  # weights of adapters before they were merged

    def use(self, state: State) -> Callable[[], None]:
        """Prepare another state; nothing is changed until the result is called, which cannot fail.

        Args:
            state: The wanted state.
        """
        active = [
            (state.adapters[name], weight)
            for name, weight in state.weights.items()
            if state.enabled and weight != 0
        ]
        changes: dict[str, list[tuple[Change, float]]] = {}
        values: dict[str, list[tuple[Tensor, bool, float]]] = {}
        for adapter, weight in active:
            if adapter.facts.name not in state.fused:
                for name, change in adapter.changes.items():
                    changes.setdefault(name, []).append((change, weight))
            for name, (value, absolute) in adapter.values.items():
                values.setdefault(name, []).append((value, absolute, weight))
        branches = {name: Branch(self._layer(name), own) for name, own in changes.items()}
        parameters = {name: self._changed(name, values.get(name, [])) for name in {*values, *self._originals}}
        kept = {name: self._original(name) for name in values}

        def commit() -> None:
            for name in self._branches.keys() - branches.keys():
                self._layer(name).branch = None
            for name, branch in branches.items():
                self._layer(name).branch = branch
            for name, parameter in parameters.items():
                owner, _, leaf = name.rpartition(".")
                setattr(self.network.get_submodule(owner), leaf, parameter)
            self._branches, self._originals, self.state = branches, kept, state
            self.version += 1

        return commit

    def _layer(self, name: str) -> Linear:
        return self.network.get_submodule(name)  # type: ignore[return-value]

    def _original(self, name: str) -> nn.Parameter:
        own = self._originals.get(name)
        return self.network.get_parameter(name) if own is None else own

    def _changed(self, name: str, values: list[tuple[Tensor, bool, float]]) -> nn.Parameter:
        """A parameter with all that adapters add to it, where the network's is now."""
        original, now = self._original(name), self.network.get_parameter(name)
        if not values:
            return nn.Parameter(original.detach().to(now.device, now.dtype), requires_grad=False)
        base = original.detach().float().cpu()
        out = base.clone()
        for value, absolute, weight in values:
            out += weight * (
                (value.float().view(base.shape) - base) if absolute else value.float().view(base.shape)
            )
        return nn.Parameter(out.to(now.device, now.dtype), requires_grad=False)

    # --- memory ---

    def device_bytes(self, rows: int) -> int:
        """Bytes beside the network's own where it runs: factors, and what branches take for `rows` of x."""
        dtype: torch.dtype = self.network.dtype  # type: ignore[assignment]
        factors = sum(branch.nbytes(dtype) for branch in self._branches.values())
        return factors + rows * max((branch.row_bytes() for branch in self._branches.values()), default=0)

    def host_bytes(self) -> int:
        """Bytes of the adapters as they were read, which stay on the host."""
        return sum(adapter.nbytes for adapter in self.state.adapters.values())

    def prepare(self, device: torch.device) -> None:
        """Make the factors on a device before the first step asks for them."""
        dtype: torch.dtype = self.network.dtype  # type: ignore[assignment]
        for branch in self._branches.values():
            branch.prepare(device, dtype)

    def release(self) -> None:
        """Drop the factors on any device; what was read stays on the host."""
        for branch in self._branches.values():
            branch.release()

    # --- merging ---

    def packed(self, names: Collection[str]) -> list[str]:
        """Layers with packed weights that the named adapters change."""
        layers = {layer for name in names for layer in self.state.adapters[name].changes}
        return sorted(name for name in layers if isinstance(self._layer(name).weight, QuantTensor))

    def fuse(self, names: Collection[str], scale: float = 1.0) -> Callable[[], None]:
        """Merge adapters into weights, which become dense; nothing is changed until the result is called.

        Args:
            names: Adapters that are active now.
            scale: Factor of their weights.
        """
        state, merged = self.state, {}
        wanted = {name: state.weights[name] * scale for name in names if name in state.weights}
        layers = {layer for name in wanted for layer in state.adapters[name].changes}
        for place in sorted(layers):
            layer = self._layer(place)
            own = [
                (state.adapters[n].changes[place], w)
                for n, w in wanted.items()
                if place in state.adapters[n].changes
            ]
            dtype: torch.dtype = self.network.dtype  # type: ignore[assignment]
            whole = merged_weight(layer, own).to(dtype)
            if not bool(torch.isfinite(whole).all()):
                raise BadWeights(f"fuse_lora: {place} would hold numbers that are not finite in {dtype}")
            merged[place] = nn.Parameter(whole, requires_grad=False)
        after = replace(state, fused=state.fused | wanted.keys(), weights={**state.weights, **wanted})
        commit = self.use(after)

        def fused() -> None:
            self._weights_before = {**{name: state.weights[name] for name in wanted}, **self._weights_before}
            commit()
            for place, weight in merged.items():
                previous = self._layer(place).set_weight(weight)
                self._unfused.setdefault(place, previous)

        return fused

    def unfuse(self) -> None:
        """Put back the weights from before adapters were merged, and let these be branches again."""
        weights = {**self.state.weights, **self._weights_before}
        commit = self.use(replace(self.state, fused=frozenset(), weights=weights))
        for place, weight in self._unfused.items():
            layer = self._layer(place)
            if isinstance(weight, QuantTensor):
                layer.set_weight(weight.to(layer.device))
            else:  # the network may have been moved or cast since
                layer.set_weight(nn.Parameter(weight.detach().to(layer.device, layer.dtype), False))
        self._unfused, self._weights_before = {}, {}
        commit()

    def settle(self) -> None:
        """Unload all adapters; those that are merged stay in the weights for good."""
        only = {name: weight for name, weight in self.state.weights.items() if name in self.state.fused}
        self.use(replace(self.state, weights=only))()
        self.merged += [(self.state.adapters[name].facts, weight) for name, weight in only.items()]
        self._originals, self._unfused, self._weights_before = {}, {}, {}
        self.use(State())()


def merged_weight(layer: Linear, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """The weight [N, K] float32 of a layer with changes and their weights.

    The branch is applied to columns of the identity, so merged and unmerged results agree by construction.
    """
    weight, branch = layer.weight, Branch(layer, changes, biased=False)
    dense = weight.dequantize(torch.float32) if isinstance(weight, QuantTensor) else weight.detach().float()
    columns = dense.shape[1]
    out = torch.empty_like(dense, memory_format=torch.contiguous_format)
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        x = torch.zeros(stop - start, columns, device=dense.device)
        x[:, start:stop].fill_diagonal_(1)

        def product(given: Any, x: Tensor = x, start: int = start, stop: int = stop) -> Tensor:
            own: Tensor = dense[:, start:stop].t().clone() if given is x else given @ dense.t()
            return own.contiguous()  # the branch adds to it in place

        with torch.no_grad():
            out[:, start:stop] = branch(product, x).t()
    return out
